"""A replay computes the same as the function; on the CPU, with a stand-in for CUDA graphs."""

import fake_cuda_graph
import pytest
import torch
from torch.testing import assert_close

from graphcaps.training.capture import Captured


@pytest.fixture
def graphs(monkeypatch):
    return fake_cuda_graph.install(monkeypatch)


def test_a_replay_computes_on_new_inputs_and_runs_no_python(graphs):
    calls = []

    def function(x, y):
        calls.append(1)
        z = (x @ y).relu()
        z[0] += 1
        return z.sum(dim=1), z

    first, second = ([torch.randn(3, 4), torch.randn(4, 5)] for _ in range(2))
    captured = Captured(function, first)
    called = len(calls)
    for inputs in (first, second, first):
        assert_close(captured(*inputs), function(*inputs))
    assert len(graphs) == 1
    assert len(calls) == called + 3  # by this test


@pytest.mark.usefixtures("graphs")
def test_gradients_are_those_of_the_last_inputs():
    weight = torch.randn(4, requires_grad=True)

    def function(x):
        weight.grad = None
        loss = (weight * x).square().sum()
        loss.backward()
        return (loss.detach(),)

    captured = Captured(function, [torch.randn(4)])
    for _ in range(2):
        x = torch.randn(4)
        (loss,) = captured(x)
        assert_close(loss, (weight * x).square().sum().detach())
        assert_close(weight.grad, (2 * weight * x.square()).detach())


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: x * torch.tensor([1.0, 2.0]),
        lambda x: x * x.tolist()[0],
        lambda x: torch.from_numpy(x.numpy()),
    ],
)
def test_a_function_that_reads_a_number_back_is_not_recorded(reads):
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        Captured(lambda x: (reads(x),), [torch.ones(2)])
