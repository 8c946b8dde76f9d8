"""Traces, compared with the reference and with loops."""

import math

import pytest
import torch
from hypothesis import given
from routings import WITH_VOTES, cases
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import reference
from graphcaps._dgl import dgl
from graphcaps.routing import Sums

every_engine = pytest.mark.parametrize("engine", WITH_VOTES)


def traced(graph, engine="auto", samples=2, iterations=3):
    layer = gc.CapsuleLayer(graph, 3, 4, engine=engine, iterations=iterations, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(10)  # so that routing decides
    u = torch.randn(samples, graph.num_nodes("child"), 3, dtype=torch.float64)
    v, trace = layer(u, return_trace=True)
    return layer, u, v, trace


@every_engine
def test_every_iteration_is_that_of_the_reference(engine):
    layer, u, v, trace = traced(gc.complete_graph(6, 3), engine)
    u_hat = reference.votes(u, layer.weight.view(6, 3, 3, 4))
    assert_close(trace.u_hat.view(2, 6, 3, 4), u_hat)
    assert_close(layer(u), v)
    logits = torch.zeros(2, 6, 3, dtype=torch.float64)
    for number in range(3):
        expected_v, expected_c = reference.dynamic_routing(u_hat, number + 1)
        assert_close(trace.b[number].view(2, 6, 3), logits)
        assert_close(trace.c[number].view(2, 6, 3), expected_c)
        assert_close(trace.v[number], expected_v)
        assert_close(reference.squash(trace.s[number]), expected_v)
        agreement = torch.einsum("bijd,bjd->bij", u_hat, expected_v)
        assert_close(trace.agreement()[number].view(2, 6, 3), agreement)
        logits = logits + agreement
    assert_close(trace.v[-1], v)


def test_the_uniform_control_has_one_iteration():
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 3, 4, routing="uniform")
    _, trace = layer(torch.randn(2, 6, 3), return_trace=True)
    assert trace.c.shape == (1, 2, 18)
    assert_close(trace.entropy(), torch.full((1, 2, 6), math.log(3)))
    assert_close(trace.effective_parents(), torch.full((1, 2, 6), 3.0))


@every_engine
@given(case=cases())
def test_entropy_and_strongest_parent_are_those_of_loops_over_the_edges(engine, case):
    _, _, _, trace = traced(case.graph, engine, samples=case.batch)
    entropy, strongest = trace.entropy(), trace.strongest_parent()
    for number in range(len(trace.c)):
        for sample in range(case.batch):
            coupling = trace.c[number, sample].tolist()
            for child in range(case.children):
                mine = [
                    (c, j) for c, (i, j) in zip(coupling, case.edges, strict=True) if i == child
                ]
                expected = -sum(c * math.log(c) for c, _ in mine if c > 0)
                assert entropy[number, sample, child].item() == pytest.approx(expected, abs=1e-9)
                most = max((c for c, _ in mine), default=None)
                best = min((j for c, j in mine if c == most), default=-1)
                assert strongest[number, sample, child].item() == best


def test_entropy_runs_from_ln_of_the_parents_down_as_routing_decides():
    _, _, _, trace = traced(gc.complete_graph(8, 4), iterations=5)
    entropy = trace.entropy()
    assert_close(entropy[0], torch.full_like(entropy[0], math.log(4)))
    means = entropy.mean(dim=(1, 2))
    assert means.diff().lt(0).all()


def test_entropy_of_a_decided_child_is_zero_and_its_gradient_finite():
    structure = gc.complete_graph(1, 2)
    u_hat = torch.zeros(2, 1)
    b = torch.tensor([[0.0], [200.0]], requires_grad=True)
    c = b.softmax(dim=0)
    nothing = torch.zeros(2, 1)
    sums = Sums(N=nothing, S=nothing, Q=None, r=None, b=b, c=c)
    trace = gc.Trace.of(structure, 1, u_hat, [gc.Iteration(sums, nothing)])
    assert trace.entropy().item() == 0
    assert trace.strongest_parent().item() == 1


def test_a_loss_may_use_the_trace():
    layer, u, _, _ = traced(gc.complete_graph(6, 3))
    _, trace = layer(u, return_trace=True)
    trace.entropy()[-1].mean().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_a_sample_is_a_dgl_graph_with_everything_on_it():
    layer, _, _, trace = traced(gc.routing_graph([2, 0, 0], [1, 0, 1], parents=3))
    graph = trace.graph(sample=1, iteration=2)
    assert sorted(graph.edata) == ["b", "c", "u_hat", "weight_index"]
    assert_close(graph.edata["c"][:, 0], trace.c[2, 1])
    assert_close(graph.edata["b"][:, 0], trace.b[2, 1])
    assert_close(graph.edata["u_hat"], trace.u_hat[1])
    parents = graph.nodes["parent"].data
    assert_close(parents["v"], trace.v[2, 1])
    assert_close(dgl.ops.copy_e_sum(graph, graph.edata["c"] * graph.edata["u_hat"]), parents["s"])
    assert list(layer.graph.edata) == ["weight_index"]


def test_a_sample_is_a_bipartite_networkx_graph_with_positions_and_weights():
    _, _, _, trace = traced(gc.routing_graph([2, 0, 0], [1, 0, 1], parents=3))
    drawn = trace.networkx(sample=1, iteration=2)
    assert len(drawn.nodes) == 6
    for (kind, _), node in drawn.nodes.items():
        x, y = node["pos"]
        assert 0 < x < 1
        assert y == node["bipartite"] == (0 if kind == "child" else 1)
    for (i, j), c in zip([(2, 1), (0, 0), (0, 1)], trace.c[2, 1].tolist(), strict=True):
        assert drawn[("child", i)][("parent", j)][0]["weight"] == c
    lengths = [drawn.nodes["parent", j]["length"] for j in range(3)]
    assert lengths == pytest.approx(trace.v[2, 1].norm(dim=-1).tolist())


def test_children_are_drawn_in_groups_with_their_mean_coupling():
    _, _, _, trace = traced(gc.routing_graph([0, 0, 1, 2, 2], [0, 1, 1, 0, 1], parents=3))
    drawn = trace.networkx(sample=1, iteration=2, groups=[1, 0, 1])
    c = trace.c[2, 1].tolist()
    edges = {(i, j): weight for (_, i), (_, j), weight in drawn.edges(data="weight")}
    assert edges == {
        (0, 1): pytest.approx(c[2]),
        (1, 0): pytest.approx((c[0] + c[3]) / 2),
        (1, 1): pytest.approx((c[1] + c[4]) / 2),
    }
    assert [drawn.nodes["child", i]["size"] for i in range(2)] == [1, 2]
    with pytest.raises(ValueError, match="one group for each of 3 children; got \\[2\\]"):
        trace.networkx(sample=0, iteration=0, groups=[0, 1])


def test_contributions_to_a_parent_add_up_to_the_length_of_its_sum():
    _, _, _, trace = traced(gc.routing_graph([0, 1, 2, 2, 3], [0, 0, 0, 2, 2]))
    shares = trace.contributions()
    for j, children in ((0, [0, 1, 2]), (2, [3, 4])):
        assert_close(shares[:, :, children].sum(dim=2), trace.s[:, :, j].norm(dim=-1))
    one, to = 0, 3  # a sample, an edge
    along = trace.s[1, one, 2] / trace.s[1, one, 2].norm()
    assert_close(shares[1, one, to], trace.c[1, one, to] * (trace.u_hat[one, to] @ along))
    assert (shares < 0).any()


def test_a_parent_whose_votes_cancel_has_no_contributions():
    graph = gc.routing_graph([0, 1], [0, 0])
    u_hat = torch.tensor([[1.0, 0], [-1, 0]])
    trace = gc.Trace.of(graph, 1, u_hat, list(gc.dynamic_routing(gc.bind(graph), u_hat, 2)))
    assert trace.contributions().eq(0).all()


def test_children_are_sorted_by_the_parents_they_couple_to():
    graph = gc.complete_graph(5, 3)
    wanted = torch.tensor([2, 0, 1, 0, 2])  # the parent of each child
    u_hat = 0.1 * torch.ones(15, 3)
    u_hat[torch.arange(5) * 3 + wanted] += 20 * torch.eye(3)[wanted]
    trace = gc.Trace.of(graph, 1, u_hat, list(gc.dynamic_routing(gc.bind(graph), u_hat, 3)))
    assert trace.children_by_parent(0, 2) == [1, 3, 2, 0, 4]
    assert trace.children_by_parent(0, 2, children=[0, 2, 3]) == [3, 2, 0]
    order = trace.children_by_parent(0, 2)
    place = trace.networkx(0, 2, children=order).nodes(data="pos")
    assert sorted(order, key=lambda i: place["child", i][0]) == order


def test_the_strongest_children_can_be_drawn_alone():
    _, _, _, trace = traced(gc.complete_graph(7, 3))
    strongest = trace.strongest_children(sample=1, iteration=2, count=2)
    drawn = trace.networkx(sample=1, iteration=2, children=strongest)
    most = trace.c[2, 1].view(7, 3).amax(dim=1)
    expected = sorted(sorted(range(7), key=lambda i: -most[i])[:2])
    assert [i for kind, i in drawn if kind == "child"] == expected
    assert strongest == expected
    assert len(drawn.edges) == 6
    assert (
        drawn[("child", expected[1])][("parent", 2)][0]["weight"]
        == trace.c[2, 1].view(7, 3)[expected[1], 2]
    )
    with pytest.raises(ValueError, match="got both"):
        trace.networkx(sample=0, iteration=0, groups=[0] * 7, children=[2])


def test_a_ragged_batch_is_traced_as_one_sample_that_dgl_parts():
    graphs = [gc.complete_graph(3, 2), gc.routing_graph([0], [1], children=2)]
    layer = gc.CapsuleLayer(graphs[0], 3, 4)
    ragged = dgl.batch(graphs)
    v, trace = layer(torch.randn(5, 3), graph=ragged, return_trace=True)
    assert v.shape == (4, 4)
    assert trace.c.shape == (3, 1, 7)
    first, second = dgl.unbatch(trace.graph(sample=0, iteration=2))
    assert_close(first.edata["c"][:, 0], trace.c[2, 0, :6])
    assert_close(second.edata["c"], torch.ones(1, 1))


def test_a_model_gives_its_trace_with_its_output():
    model = gc.CapsNet.from_preset("small", conv_channels=4, capsule_maps=1)
    images = torch.rand(2, 1, 28, 28)
    output, trace = model(images, return_trace=True)
    assert trace.c.shape == (3, 2, 360)
    assert_close(trace.v[-1], output.poses)
    assert_close(model(images).lengths, output.lengths)


def test_without_being_asked_nothing_is_kept():
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 3, 4)
    assert isinstance(layer(torch.randn(2, 6, 3)), torch.Tensor)
