"""Results on a GPU equal those on the CPU; `builtin` and `udf` are tested if DGL has CUDA."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from routings import ENGINES
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import reference
from graphcaps._dgl import why_not_on
from graphcaps.kernels import routed
from graphcaps.kernels.triton import TritonEdges
from graphcaps.kernels.triton.couple import couple, couple_backward
from graphcaps.training.capture import Captured
from graphcaps.training.loop import train
from graphcaps.training.settings import TrainSettings

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
    v = routed(u, weight, edges, iterations=3)
    got = (v.detach(), *torch.autograd.grad(v, (u, weight), gradient))
    truth = dense_layer(u, weight, gradient, parents, torch.float64)
    rival = dense_layer(u, weight, gradient, parents, torch.float32)
    for name, right, actual, other in zip(("v", "du", "dW"), truth, got, rival, strict=True):
        unit = torch.finfo(torch.float32).eps * right.abs().max()
        error, allowed = (actual - right).abs().max(), 2 * (other - right).abs().max() + 16 * unit
        assert error <= allowed, f"{name}: {error / unit:.1f} units, allowed {allowed / unit:.1f}"


@pytest.mark.parametrize("routing", ["dynamic", "em"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_training_step_gives_the_gradients_of_eager_mode(mode, routing):
    graph = gc.complete_graph(32, 10)
    layer = gc.CapsuleLayer(graph, 16, 16, rows=4, routing=routing, engine="fused", device="cuda")

    def loss_of(u):
        found = layer(u)
        return (found if routing == "dynamic" else found.poses).square().sum()

    compiled = torch.compile(loss_of, fullgraph=True, mode=mode)
    for _ in range(3):  # recorded at the second call, replayed at the third
        u = torch.randn(64, 32, 16, device="cuda")
        layer.zero_grad()
        compiled(u).backward()
        (expected,) = torch.autograd.grad(loss_of(u), layer.weight)
        assert_close(layer.weight.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_gives_equal_bits_and_never_stores_the_votes(dtype):
    batch, children, parents = 128, 1152, 10
    edges, u, weight, gradient = triton_layer(children, parents, batch, dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = []
    for _ in range(2):
        v = routed(u, weight, edges, iterations=3)
        results.append((v.detach(), *torch.autograd.grad(v, (u, weight), gradient)))
    assert all(map(torch.equal, *results))
    votes = batch * children * parents * 16 * dtype.itemsize
    assert torch.cuda.max_memory_allocated() - before < votes


def general_pass(children, parents, batch, rows, child_dim, parent_dim, terms, device="cuda"):
    """A pass over a complete graph: its arguments, and gradients of N, S and Q."""
    pytest.importorskip("triton", reason="triton is not installed")
    kinds = children * parents
    edges = TritonEdges.of(gc.complete_graph(children, parents), kinds, torch.device(device))
    of_parents = (batch, parents, rows * parent_dim)
    inputs = {
        "u": torch.randn(batch, children, rows * child_dim),
        "weight": torch.randn(kinds, child_dim, parent_dim) / child_dim**0.5,
        "a": torch.rand(batch, children),
        "r": torch.randn(of_parents),
        "k": torch.randn(of_parents[:2]),
        "p": torch.randn(of_parents) / of_parents[2] ** 0.5,
        "q": -torch.rand(of_parents) / of_parents[2],
        "beta": torch.rand(kinds),
        "prior": torch.randn(kinds),
    }
    inputs = {n: x.to(device) if n in ("u", "weight", *terms) else None for n, x in inputs.items()}
    sums = (torch.randn(of_parents[:2]), torch.randn(of_parents), torch.randn(of_parents))
    how = (edges.tensors, parents, rows, False, "squares" in terms, False)
    return inputs, how, tuple(x.to(device) for x in sums)


def by_triton(inputs, how, of_sums):
    """N, S, Q and all gradients except that of r."""
    values = tuple(inputs.values())
    *sums, kept = couple(*values, *how)
    needed = {name: x is not None for name, x in inputs.items() if name != "r"}
    found = couple_backward(*of_sums, kept, *values, *how, list(needed.values()))
    gradients = {f"d{name}": x for name, x in zip(needed, found, strict=True) if needed[name]}
    return dict(zip("NSQ", sums if how[-1] else sums[:2], strict=False)) | gradients


def by_votes(inputs, how, of_sums, dtype):
    """The same, densely, by autograd."""
    _, parents, rows, _, squares = how
    x = {n: v if v is None else v.to(dtype).requires_grad_() for n, v in inputs.items()}
    weight = x["weight"].unflatten(0, (-1, parents))
    y = torch.einsum("bipk,ijkd->bijpd", x["u"].unflatten(2, (rows, -1)), weight).flatten(3)
    if x["r"] is not None:
        y = y - x["r"][:, None]
    b = torch.zeros_like(y[..., 0])
    for name, factor in (("k", None), ("p", y), ("q", y**2)):
        if x[name] is not None:
            term = x[name][:, None]
            b = b + (term if factor is None else (term * factor).sum(3))
    if x["prior"] is not None:
        b = b + x["prior"].view(b.shape[1:])
    w = b.softmax(2)
    w = w if x["beta"] is None else w + x["beta"].view(b.shape[1:])
    w = w if x["a"] is None else w * x["a"][..., None]
    sums = {"N": w.sum(1), "S": torch.einsum("bij,bijd->bjd", w, y)}
    if squares:
        sums["Q"] = torch.einsum("bij,bijd->bjd", w, y**2)
    total = sum((s * d.to(dtype)).sum() for s, d in zip(sums.values(), of_sums, strict=False))
    there = {n: v for n, v in x.items() if v is not None and n != "r"}
    gradients = torch.autograd.grad(total, tuple(there.values()), materialize_grads=True)
    return {n: s.detach() for n, s in sums.items()} | {
        f"d{name}": gradient for name, gradient in zip(there, gradients, strict=True)
    }


EVERY_TERM = ("a", "r", "k", "p", "q", "beta", "prior", "squares")
PASSES = {  # children, parents, batch, rows, child_dim, parent_dim, terms
    "attention": (1152, 10, 33, 1, 8, 16, ("p",)),
    "EM": (1152, 10, 33, 4, 4, 4, ("a", "r", "k", "q", "squares")),
    "every term": (1152, 10, 33, 1, 8, 16, EVERY_TERM),
    "many parents": (3, 5000, 5, 1, 8, 16, EVERY_TERM),
    "one parent": (5000, 1, 5, 1, 8, 16, EVERY_TERM),
    "odd sizes": (37, 5, 129, 3, 5, 7, EVERY_TERM),
}


@pytest.mark.parametrize("sizes", PASSES.values(), ids=PASSES)
def test_a_pass_by_triton_errs_little_more_than_the_dense_form(monkeypatch, sizes):
    """Against float64; besides twice the dense form's own error, 16 units are allowed."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    job = general_pass(*sizes)
    got = by_triton(*job)
    truth, rival = (by_votes(*job, dtype) for dtype in (torch.float64, torch.float32))
    assert got.keys() == truth.keys()
    for name, right in truth.items():
        unit = torch.finfo(torch.float32).eps * right.abs().max()
        error = (got[name] - right).abs().max()
        allowed = 2 * (rival[name] - right).abs().max() + 16 * unit
        assert error <= allowed, f"{name}: {error / unit:.1f} units, allowed {allowed / unit:.1f}"


def test_a_pass_by_triton_gives_equal_bits_and_never_stores_the_votes():
    job = general_pass(1152, 10, 128, 4, 4, 4, ("a", "r", "k", "q", "squares"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once = by_triton(*job)
    votes = 128 * 1152 * 10 * 16 * 4
    assert torch.cuda.max_memory_allocated() - before < votes
    again = by_triton(*job)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_pass_by_triton_sees_nan_in_one_matrix_in_every_parent_of_its_child():
    inputs, how, of_sums = general_pass(40, 10, 3, 1, 8, 16, ("p",))
    inputs["weight"][0] = torch.nan
    assert by_triton(inputs, how, of_sums)["N"].isnan().all()


def test_triton_counts_beyond_31_bits():
    """The offset of the last image exceeds 2³¹, unless it is routed alone."""
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
    v_alone, v_last = (routed(u, weight, edges, iterations=3) for u in (alone, last))
    assert_close(v_last[-1:], v_alone)
    (du_alone,) = torch.autograd.grad(v_alone.sum(), alone)
    (du_last,) = torch.autograd.grad(v_last.sum(), last)
    assert_close(du_last[-1:], du_alone)
