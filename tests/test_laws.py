"""The laws of routing, for every algorithm, engine and dtype."""

import pytest
import torch
from by_hand import route_by_hand
from hypothesis import given
from hypothesis import strategies as st
from routings import ALGORITHMS, ENGINES, Case, cases, complete, route, route_densely
from torch.testing import assert_close

import graphcaps as gc
from graphcaps._dgl import dgl

every_engine = pytest.mark.parametrize("engine", ENGINES)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

SIZES = [(1, 1), (1, 7), (7, 1), (3, 5), (129, 3), (5, 131)]


def with_gradient(function, u_hat, *args):
    """v, c, and the gradient of a fixed random functional of both with respect to the votes."""
    u_hat = u_hat.detach().requires_grad_()
    v, c = function(u_hat, *args)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
        for x in (v, c)
    )
    (gradient,) = torch.autograd.grad(loss + 0 * u_hat.sum(), u_hat)  # where there is no edge
    return v.detach(), c.detach(), gradient


@every_engine
@every_algorithm
@given(case=cases())
def test_outputs_coupling_and_gradients_equal_the_reference(engine, algorithm, case):
    u_hat = case.votes()
    got = with_gradient(lambda x: route(case, x, algorithm, engine), u_hat)
    expected = with_gradient(lambda x: route_densely(case, x, algorithm), u_hat)
    for actual, right in zip(got, expected, strict=True):
        assert_close(actual, right, rtol=1e-9, atol=1e-11)


@every_engine
@given(case=cases())
def test_outputs_and_coupling_equal_the_procedure_in_loops(engine, case):
    u_hat = case.votes()
    v, c = route(case, u_hat, "dynamic", engine)
    edges = len(case.edges)
    for sample in range(case.batch if edges else 0):
        votes = u_hat[sample * edges : (sample + 1) * edges].tolist()
        v_by_hand, c_by_hand = route_by_hand(
            case.edges, votes, case.children, case.parents, case.iterations
        )
        assert_close(v[sample], torch.tensor(v_by_hand, dtype=torch.float64))
        got = c[sample * edges : (sample + 1) * edges, 0]
        assert_close(got, torch.tensor(c_by_hand, dtype=torch.float64))


@every_engine
@every_algorithm
@pytest.mark.parametrize(("children", "parents"), [*SIZES, (1152, 10)])
def test_float32_errs_no_more_than_the_dense_form(engine, algorithm, children, parents):
    """Against float64; besides the dense form's own error, 4 units of float32 are allowed."""
    case = complete(children, parents, dim=8)
    u_hat = case.votes() / children**0.5
    truth = with_gradient(lambda x: route_densely(case, x, algorithm), u_hat)
    graph = with_gradient(lambda x: route(case, x, algorithm, engine), u_hat.float())
    dense = with_gradient(lambda x: route_densely(case, x, algorithm), u_hat.float())
    for name, right, got, rival in zip(("v", "c", "gradient"), truth, graph, dense, strict=True):
        unit = torch.finfo(torch.float32).eps * right.abs().max()
        error, allowed = (got - right).abs().max(), (rival - right).abs().max() + 4 * unit
        assert error <= allowed, f"{name}: {error / unit:.1f} units, allowed {allowed / unit:.1f}"


@every_engine
@every_algorithm
@every_dtype
@given(case=cases())
def test_coupling_sums_to_one_over_the_parents_of_a_child(engine, algorithm, dtype, case):
    _, c = route(case, case.votes(dtype), algorithm, engine)
    total = case.dense(c).sum(dim=(2, 3))
    has_parents = case.mask.any(dim=1)
    assert_close(total, has_parents.to(dtype).expand(case.batch, -1))


@every_engine
@every_algorithm
@every_dtype
@given(case=cases())
def test_a_sample_is_routed_alike_alone_and_in_a_batch(engine, algorithm, dtype, case):
    u_hat = case.votes(dtype)
    together, _ = route(case, u_hat, algorithm, engine)
    for sample, votes in enumerate(u_hat.view(case.batch, len(case.edges), case.dim)):
        alone, _ = route(case._replace(batch=1), votes, algorithm, engine)
        assert_close(alone[0], together[sample])


@every_engine
@every_algorithm
@every_dtype
@given(case=cases(), random=st.randoms(use_true_random=False))
def test_the_order_of_the_edges_does_not_matter(engine, algorithm, dtype, case, random):
    order = random.sample(range(len(case.edges)), len(case.edges))
    shuffled = case._replace(edges=[case.edges[e] for e in order])
    u_hat = case.votes(dtype)
    votes = u_hat.view(case.batch, len(case.edges), case.dim)[:, order].reshape(u_hat.shape)
    v, c = route(case, u_hat, algorithm, engine)
    v_shuffled, c_shuffled = route(shuffled, votes, algorithm, engine)
    assert_close(v_shuffled, v)
    assert_close(shuffled.dense(c_shuffled), case.dense(c))


@every_engine
@every_algorithm
@every_dtype
@given(case=cases(), random=st.randoms(use_true_random=False))
def test_names_of_children_and_parents_do_not_matter(engine, algorithm, dtype, case, random):
    child = random.sample(range(case.children), case.children)
    parent = random.sample(range(case.parents), case.parents)
    renamed = case._replace(edges=[(child[i], parent[j]) for i, j in case.edges])
    u_hat = case.votes(dtype)
    v, c = route(case, u_hat, algorithm, engine)
    v_renamed, c_renamed = route(renamed, u_hat, algorithm, engine)
    assert_close(v_renamed[:, parent], v)
    assert_close(c_renamed, c)


@every_engine
@every_algorithm
@every_dtype
def test_routing_is_finite_at_zero_votes(engine, algorithm, dtype):
    case = Case(3, 3, [(0, 0), (0, 1), (2, 1)], batch=2, dim=4, iterations=3)
    zeros = torch.zeros(6, 4, dtype=dtype)
    v, c, gradient = with_gradient(lambda x: route(case, x, algorithm, engine), zeros)
    assert v.eq(0).all()
    assert_close(c[:3, 0], torch.tensor([0.5, 0.5, 1.0], dtype=dtype))
    assert gradient.isfinite().all()


@every_engine
@every_dtype
def test_large_votes_do_not_overflow(engine, dtype):
    """Logits far beyond where exp alone is infinite."""
    case = complete(4, 3)
    v, c = route(case, 1e4 * case.votes(dtype), "dynamic", engine)
    assert v.isfinite().all()
    assert c.isfinite().all()
    assert_close(case.dense(c).sum(dim=(2, 3)), torch.ones(case.batch, 4, dtype=dtype))


@every_engine
@every_algorithm
@every_dtype
@pytest.mark.parametrize(("children", "parents"), SIZES)
def test_sizes_of_one_odd_and_beyond_128_equal_the_reference(
    engine, algorithm, dtype, children, parents
):
    case = complete(children, parents, batch=3, dim=5)
    u_hat = case.votes(dtype)
    v, c = route(case, u_hat, algorithm, engine)
    v_dense, c_dense = route_densely(case, u_hat, algorithm)
    assert_close(v, v_dense, rtol=1e-4, atol=1e-5)
    assert_close(c, c_dense, rtol=1e-4, atol=1e-5)


@every_engine
@every_algorithm
def test_gradients_are_those_of_finite_differences(engine, algorithm):
    case = Case(3, 4, [(0, 0), (2, 1), (0, 1), (0, 3), (2, 3)], batch=2, dim=3, iterations=3)
    u_hat = case.votes().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: route(case, x, algorithm, engine), (u_hat,))


@pytest.mark.parametrize("engine", ["udf", "builtin"])
def test_second_derivatives_that_dgl_does_not_give_are_refused(engine):
    case = complete(3, 2)
    u_hat = case.votes().requires_grad_()
    v = route(case, u_hat, "dynamic", engine)[0]
    with pytest.raises(RuntimeError, match="use engine='scatter'"):
        torch.autograd.grad(v.square().sum(), u_hat, create_graph=True)


def test_second_derivatives_of_scatter_are_those_of_finite_differences():
    """DGL's edge softmax has none on the CPU, see the README."""
    case = Case(3, 2, [(0, 0), (2, 1), (0, 1), (2, 0)], batch=1, dim=2, iterations=2)
    u_hat = case.votes().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: route(case, x, "dynamic", "scatter")[0], (u_hat,))


@every_engine
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(iterations=0), "iterations must be at least 1; got 0"),
        (dict(gradients="al"), "unknown gradients 'al'"),
        (dict(u_hat=torch.zeros(5, 4)), r"each of the 6 edges, \[6, D\]; got \[5, 4\]"),
    ],
)
def test_what_cannot_be_routed_is_refused(engine, changes, said):
    asked = dict(u_hat=torch.zeros(6, 4)) | changes
    with pytest.raises(ValueError, match=said):
        next(gc.dynamic_routing(gc.bind(gc.complete_graph(3, 2), engine), **asked))


@every_engine
def test_gradients_of_the_last_iteration_alone_equal_the_reference(engine):
    case = complete(5, 3)
    u_hat = case.votes()
    last = with_gradient(lambda x: route(case, x, "dynamic", engine, "last"), u_hat)
    expected = with_gradient(lambda x: route_densely(case, x, "dynamic", "last"), u_hat)
    every = with_gradient(lambda x: route(case, x, "dynamic", engine, "all"), u_hat)
    assert_close(last[2], expected[2])
    assert not torch.allclose(last[2], every[2], rtol=0.01)


@every_engine
@every_algorithm
@every_dtype
def test_graphs_of_different_sizes_route_in_one_batch_as_they_would_alone(engine, algorithm, dtype):
    parts = [
        complete(3, 2, batch=1),
        Case(5, 4, [(4, 0), (0, 3), (4, 3), (1, 1)], 1, 4, 3),
        Case(2, 3, [], 1, 4, 3),
        complete(1, 1, batch=1),
    ]
    votes = [part.votes(dtype) for part in parts]
    passing = gc.bind(dgl.batch([part.graph for part in parts]), engine)
    algorithms = {"dynamic": gc.dynamic_routing, "uniform": gc.uniform_routing}
    *_, ragged = algorithms[algorithm](passing, torch.cat(votes))
    alone = [route(p, x, algorithm, engine) for p, x in zip(parts, votes, strict=True)]
    assert_close(ragged.v, torch.cat([v[0] for v, _ in alone]))
    assert_close(ragged.c, torch.cat([c for _, c in alone]))


@every_engine
def test_two_edges_between_the_same_nodes_are_two_votes(engine):
    edges = [(0, 0), (0, 0), (0, 1), (1, 1)]
    u_hat = torch.randn(4, 3, dtype=torch.float64)
    graph = gc.routing_graph(*zip(*edges, strict=True))
    *_, last = gc.dynamic_routing(gc.bind(graph, engine), u_hat, iterations=3)
    v_by_hand, c_by_hand = route_by_hand(edges, u_hat.tolist(), 2, 2, 3)
    assert_close(last.v, torch.tensor(v_by_hand, dtype=torch.float64))
    assert_close(last.c[:, 0], torch.tensor(c_by_hand, dtype=torch.float64))


@every_engine
def test_routing_yields_every_iteration(engine):
    case = complete(6, 3, batch=2)
    u_hat = case.votes()
    passing = gc.bind(gc.batch_graph(case.graph, 2), engine)
    seen = list(gc.dynamic_routing(passing, u_hat, iterations=4))
    assert len(seen) == 4
    for number, iteration in enumerate(seen, start=1):
        v, c = route_densely(case._replace(iterations=number), u_hat, "dynamic")
        assert_close(iteration.v.view(v.shape), v)
        assert_close(iteration.c, c)
        assert_close(iteration.v, gc.squash(iteration.s))
    assert seen[0].b.eq(0).all()


@every_engine
@given(case=cases())
def test_a_parent_feature_expands_to_each_of_its_edges(engine, case):
    passing = gc.bind(gc.batch_graph(case.graph, case.batch), engine)
    v = torch.randn(case.batch * case.parents, 2)
    expected = [v[sample * case.parents + j] for sample in range(case.batch) for _, j in case.edges]
    got = passing.expand_to_edges(v)
    assert got.shape == (len(expected), 2)
    assert all(map(torch.equal, got, expected))
