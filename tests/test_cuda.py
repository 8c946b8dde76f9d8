"""On a GPU, the same numbers as on the CPU; `builtin` and `udf` only where DGL has CUDA."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from routings import ENGINES
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import reference
from graphcaps._dgl import why_not_on
from graphcaps.capture import Captured
from graphcaps.kernels.dynamic_triton import TritonEdges, routed
from graphcaps.settings import TrainSettings
from graphcaps.training import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DIGITS = Path(__file__).parent / "digits"


def on_device(engine):
    if engine != "scatter" and why_not_on(torch.device("cuda")) is not None:
        pytest.skip("this DGL is a build without CUDA")
    return "cuda"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "graph", [gc.complete_graph(6, 3), gc.routing_graph([5, 0, 0, 2], [1, 2, 0, 2], parents=4)]
)
def test_a_layer_gives_on_the_gpu_what_it_gives_on_the_cpu(engine, graph):
    device = on_device(engine)
    layer = gc.CapsuleLayer(graph, 4, 5, engine=engine, dtype=torch.float64)
    u = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    v = layer(u)
    v.square().sum().backward()
    expected = [v.detach(), u.grad, layer.weight.grad]
    layer.zero_grad()
    layer.to(device)
    moved = u.detach().to(device).requires_grad_()
    v = layer(moved)
    v.square().sum().backward()
    for got, right in zip([v.detach(), moved.grad, layer.weight.grad], expected, strict=True):
        assert_close(got.cpu(), right)


@pytest.mark.parametrize("engine", ["fused", "auto"])
@pytest.mark.parametrize(
    "graph", [gc.complete_graph(40, 10), gc.routing_graph([5, 0, 0, 2], [1, 2, 0, 2], parents=4)]
)
def test_a_layer_without_votes_gives_on_the_gpu_what_it_gives_on_the_cpu(engine, graph):
    layer = gc.CapsuleLayer(graph, 8, 16, engine="builtin")
    u = torch.randn(9, graph.num_nodes("child"), 8)
    expected = layer(u)
    layer.engine = engine
    assert_close(layer.to("cuda")(u.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_ragged_batch_is_routed_on_the_gpu(engine):
    device = on_device(engine)
    graph = gc.routing_graph([0, 1, 1], [0, 0, 1])
    layer = gc.CapsuleLayer(graph, 4, 5, engine=engine)
    u = torch.randn(2, 4)
    expected = layer(u, graph=graph)
    assert_close(layer.to(device)(u.to(device), graph=graph).cpu(), expected)


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_net_is_trained_on_the_gpu(amp, cuda_graph, tmp_path):
    asked = dict(dataset=str(DIGITS), run_dir=tmp_path / "run", preset="small", device="cuda")
    asked |= dict(epochs=12, batch_size=49, amp=amp, cuda_graph=cuda_graph)
    assert train(TrainSettings(**asked))["test_errors"] < 50


@pytest.mark.parametrize("engine", ["fused", "scatter"])
def test_what_is_replayed_is_what_is_computed(engine):
    model = gc.CapsNet.from_preset("small", engine=engine).to("cuda")

    def loss_and_gradients(images, labels):
        model.zero_grad()
        loss = gc.capsnet_loss(model(images, labels), images, labels)
        loss.backward()
        return loss.detach(), *(p.grad for p in model.parameters())

    batches = [(torch.rand(7, 1, 28, 28).cuda(), torch.randint(10, (7,)).cuda()) for _ in range(2)]
    plain = [[x.clone() for x in loss_and_gradients(*batch)] for batch in batches]
    captured = Captured(loss_and_gradients, batches[0])
    for batch, right in zip(batches, plain, strict=True):
        assert_close([x.clone() for x in captured(*batch)], right, rtol=1e-3, atol=1e-5)


def triton_layer(children, parents, batch, dtype=torch.float32):
    """Edges, u, W and a gradient of v for a complete graph, on the GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    device, kinds = torch.device("cuda"), children * parents
    edges = TritonEdges.of(gc.complete_graph(children, parents), kinds, device)
    u = torch.randn(batch, children, 8, device=device, dtype=dtype, requires_grad=True)
    weight = (0.1 * torch.randn(kinds, 8, 16, device=device)).to(dtype).requires_grad_()
    return edges, u, weight, torch.randn(batch, parents, 16, device=device).to(dtype)


def dense_layer(u, weight, gradient, parents, dtype):
    """v, du and dW by the reference."""
    u, weight = (x.detach().to(dtype).requires_grad_() for x in (u, weight))
    u_hat = reference.votes(u, weight.unflatten(0, (-1, parents)))
    v, _ = reference.dynamic_routing(u_hat, 3)
    return v.detach(), *torch.autograd.grad(v, (u, weight), gradient.to(dtype))


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(("children", "parents", "batch"), [(1152, 10, 33), (3872, 196, 1)])
def test_triton_errs_little_more_than_the_dense_form(
    monkeypatch, children, parents, batch, complete
):
    """Against float64; besides twice the dense form's own error, 16 units are allowed."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    edges, u, weight, gradient = triton_layer(children, parents, batch)
    edges = replace(edges, complete=complete)
    v = routed(u, weight, edges)
    got = (v.detach(), *torch.autograd.grad(v, (u, weight), gradient))
    truth = dense_layer(u, weight, gradient, parents, torch.float64)
    rival = dense_layer(u, weight, gradient, parents, torch.float32)
    for name, right, actual, other in zip(("v", "du", "dW"), truth, got, rival, strict=True):
        unit = torch.finfo(torch.float32).eps * right.abs().max()
        error, allowed = (actual - right).abs().max(), 2 * (other - right).abs().max() + 16 * unit
        assert error <= allowed, f"{name}: {error / unit:.1f} units, allowed {allowed / unit:.1f}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_gives_equal_bits_and_never_stores_the_votes(dtype):
    batch, children, parents = 128, 1152, 10
    edges, u, weight, gradient = triton_layer(children, parents, batch, dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = []
    for _ in range(2):
        v = routed(u, weight, edges)
        results.append((v.detach(), *torch.autograd.grad(v, (u, weight), gradient)))
    assert all(map(torch.equal, *results))
    votes = batch * children * parents * 16 * dtype.itemsize
    assert torch.cuda.max_memory_allocated() - before < votes


def test_triton_counts_beyond_31_bits():
    """The last image's offset passes 2³¹; routed alone it does not."""
    pytest.importorskip("triton", reason="triton is not installed")
    device, children, batch, dim = torch.device("cuda"), 1 << 17, 130, 128
    if torch.cuda.get_device_properties(device).total_memory < 24 << 30:
        pytest.skip("needs a GPU with 24 GiB")
    child = torch.arange(children)
    graph = gc.routing_graph(child, 0 * child, weight_index=0 * child)
    edges = TritonEdges.of(graph, 1, device)
    u = torch.randn(batch, children, dim, device=device, dtype=torch.bfloat16)
    assert u.numel() > 2**31
    weight = torch.randn(1, dim, 16, device=device, dtype=torch.bfloat16)
    alone, last = u[-1:].clone().requires_grad_(), u.requires_grad_()
    v_alone, v_last = routed(alone, weight, edges), routed(last, weight, edges)
    assert_close(v_last[-1:], v_alone)
    (du_alone,) = torch.autograd.grad(v_alone.sum(), alone)
    (du_last,) = torch.autograd.grad(v_last.sum(), last)
    assert_close(du_last[-1:], du_alone)
