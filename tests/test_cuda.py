"""On a GPU, the same numbers as on the CPU; `builtin` and `udf` only where DGL has CUDA."""

from pathlib import Path

import pytest
import torch
from routings import ENGINES
from torch.testing import assert_close

import graphcaps as gc
from graphcaps._dgl import why_not_on
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


@pytest.mark.parametrize("engine", ENGINES)
def test_a_ragged_batch_is_routed_on_the_gpu(engine):
    device = on_device(engine)
    graph = gc.routing_graph([0, 1, 1], [0, 0, 1])
    layer = gc.CapsuleLayer(graph, 4, 5, engine=engine)
    u = torch.randn(2, 4)
    expected = layer(u, graph=graph)
    assert_close(layer.to(device)(u.to(device), graph=graph).cpu(), expected)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_net_is_trained_on_the_gpu(amp, tmp_path):
    asked = dict(dataset=str(DIGITS), run_dir=tmp_path / "run", preset="small", device="cuda")
    result = train(TrainSettings(**asked, epochs=12, batch_size=49, amp=amp))
    assert result["test_errors"] < 50
