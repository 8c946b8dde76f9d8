"""A user-defined routing runs on every graph and engine."""

import pytest
import torch
from routings import ENGINES, SPARSE, WITH_VOTES, complete, dense_votes
from torch.testing import assert_close

import graphcaps as gc

every_engine = pytest.mark.parametrize("engine", ENGINES)


class Medians(gc.Routing):
    """A routing of two passes that differs from all routings of the package."""

    def __init__(self, sharpness=2.0):
        super().__init__()
        self.sharpness = sharpness

    def build(self, sizes):
        self.scale = torch.nn.Parameter(torch.empty(sizes.parent_dim))

    def reset_parameters(self, weight):
        torch.nn.init.normal_(weight)
        torch.nn.init.constant_(self.scale, 0.7)

    def steps(self, edges):
        mean = edges.couple().S
        sums = edges.couple(p=self.sharpness * mean, k=mean[:, :1], r=mean)
        yield gc.Iteration(sums, torch.tanh(self.scale * sums.S) + sums.N)


def medians(u_hat, mask, scale, sharpness=2.0):
    """The same on dense votes `[B, I, J, D]`."""
    equal = mask.to(u_hat) / mask.sum(dim=1, keepdim=True).clamp_min(1)
    mean = torch.einsum("ij,bijd->bjd", equal, u_hat)
    y = u_hat - mean.unsqueeze(1)
    b = torch.einsum("bijd,bjd->bij", y, sharpness * mean) + mean[:, :, 0].unsqueeze(1)
    c = b.masked_fill(~mask, -1e30).softmax(dim=2) * mask
    S = torch.einsum("bij,bijd->bjd", c, y)
    return torch.tanh(scale * S) + c.sum(dim=1).unsqueeze(-1)


@every_engine
@pytest.mark.parametrize("case", [complete(6, 3), SPARSE])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_its_formula_is_computed_and_differentiated_and_it_trains(engine, case, batch):
    layer = gc.CapsuleLayer(case.graph, 4, 4, routing=Medians(), engine=engine, dtype=torch.float64)
    u = torch.randn(batch, case.children, 4, dtype=torch.float64, requires_grad=True)
    inputs = [u, *layer.parameters()]
    v = layer(u)
    expected = medians(dense_votes(layer, case, u), case.mask, layer.routing.scale)
    assert_close(v, expected)
    got, right = (torch.autograd.grad(x.square().sum(), inputs) for x in (v, expected))
    for x, y in zip(got, right, strict=True):
        assert_close(x, y)
    optimizer, losses = torch.optim.Adam(layer.parameters(), 0.05), []
    for _ in range(20):
        loss = (layer(u.detach()) - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("engine", WITH_VOTES)
def test_it_is_traced(engine):
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 4, routing=Medians(), engine=engine)
    v, trace = layer(torch.randn(2, 6, 4), return_trace=True)
    assert_close(trace.v[-1], v)
    assert_close(trace.c[0].view(2, 6, 3).sum(dim=2), torch.ones(2, 6))


def test_registered_it_is_known_by_its_name(monkeypatch):
    monkeypatch.setitem(gc.ROUTINGS, "medians", Medians)
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 4, routing="medians", sharpness=1.0)
    assert layer.routing.sharpness == 1.0
    with pytest.raises(ValueError, match="no option iterations; it takes sharpness"):
        gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 4, routing="medians", iterations=2)


def test_one_that_looks_at_the_votes_says_so_and_is_not_given_to_fused():
    class Largest(gc.Routing):
        needs_votes = True

        def steps(self, edges):
            sums = edges.couple()
            yield gc.Iteration(sums, sums.S * edges.u_hat.abs().max())

    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 4, routing=Largest())
    assert layer(torch.randn(64, 6, 4)).shape == (64, 3, 4)
    layer.engine = "fused"
    with pytest.raises(RuntimeError, match="Largest routing asks for the votes"):
        layer(torch.randn(64, 6, 4))


def test_a_routing_that_learns_belongs_to_one_layer():
    routing = gc.DynamicRouting(bias=True)
    gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 4, routing=routing)
    with pytest.raises(ValueError, match="already has the parameters of another layer"):
        gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 4, routing=routing)
    shared = gc.DynamicRouting()
    for _ in range(2):
        gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 4, routing=shared)


def test_a_routing_without_steps_says_what_is_missing():
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 4, routing=gc.Routing())
    with pytest.raises(NotImplementedError, match="Routing must implement steps"):
        layer(torch.zeros(2, 6, 4))


def test_parents_of_one_type_share_what_is_learned_for_them():
    graph = gc.routing_graph([0, 0, 0], [0, 1, 2], parent_type=[1, 0, 1])
    layer = gc.CapsuleLayer(graph, 4, 4, routing="em")
    assert layer.routing.beta_a.shape == (2,)
    many_types = gc.routing_graph([0, 0, 0], [0, 1, 2], weight_index=[0, 1, 2])
    with pytest.raises(
        ValueError, match="parents of 3 types, but the routing has parameters for 2"
    ):
        layer(torch.zeros(1, 4), graph=many_types)


def test_what_is_learned_for_a_type_of_parents_is_that_of_each_of_them():
    types = [1, 0, 1]
    shared, own = (
        gc.CapsuleLayer(
            gc.routing_graph([0, 0, 0], [0, 1, 2], parent_type=parent_type),
            *(4, 4),
            routing="dynamic",
            bias=True,
        )
        for parent_type in (types, [0, 1, 2])
    )
    with torch.no_grad():
        own.weight.copy_(shared.weight)
        own.routing.bias.copy_(shared.routing.bias.normal_()[types])
    u = torch.randn(2, 1, 4)
    assert_close(shared(u), own(u))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_gradient_flows_through_detached_edges(engine):
    class Detached(gc.Routing):
        def steps(self, edges):
            sums = edges.detach().couple()
            yield gc.Iteration(sums, sums.S)

    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 4, routing=Detached(), engine=engine)
    assert not layer(torch.randn(2, 6, 4, requires_grad=True)).requires_grad
