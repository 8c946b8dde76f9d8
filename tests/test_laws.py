"""The laws of routing, for every routing, engine and dtype: poses and matrices in, parents out."""

from inspect import signature

import pytest
import torch
from by_hand import route_by_hand
from hypothesis import given, settings
from routings import (
    CASES,
    DTYPES,
    ENGINES,
    SPARSE,
    VARIANTS,
    WIDEST,
    WITH_VOTES,
    Case,
    Poses,
    Routed,
    assert_equal,
    cases,
    complete,
    fits,
    make_layer,
    make_poses,
    results_and_gradients,
    route,
    route_densely,
    with_gradients,
)
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import reference
from graphcaps._dgl import dgl
from graphcaps.routing import ROUTINGS

every_engine = pytest.mark.parametrize("engine", ENGINES)
every_engine_with_votes = pytest.mark.parametrize("engine", WITH_VOTES)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

SIZES = [(1, 1), (1, 7), (7, 1), (3, 5), (129, 3), (5, 131)]


def both(case, variant, engine, dtype=WIDEST, **options):
    """The layer's results and gradients, and those of the reference, by name."""
    layer = make_layer(case, variant, engine, dtype, **options)
    poses = with_gradients(make_poses(case, variant, dtype))
    got = results_and_gradients(route(layer, poses), layer, poses)
    dense, _ = route_densely(layer, case, poses)
    return got, results_and_gradients(dense, layer, poses)


def test_every_routing_has_a_dense_counterpart_and_a_place_in_the_laws():
    assert set(gc.ROUTINGS) == set(gc.reference.ROUTINGS)
    assert {variant.routing for variant in VARIANTS.values()} == set(gc.ROUTINGS)


@every_engine
@every_variant
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_equal_the_reference(engine, variant, case):
    if not fits(variant, CASES[case]):
        with pytest.raises(ValueError, match="vectors, rows=1; got rows=2"):
            make_layer(CASES[case], variant, engine)
        return
    got, expected = both(CASES[case], variant, engine)
    assert_equal(got, expected)


@every_engine
@every_variant
@settings(max_examples=10)
@given(case=cases())
def test_results_and_gradients_equal_the_reference_on_any_graph(engine, variant, case):
    got, expected = both(case, variant, engine)
    assert_equal(got, expected)


@every_engine
def test_dynamic_routing_equals_the_procedure_in_loops(engine):
    layer = make_layer(SPARSE, "dynamic", engine)
    poses = make_poses(SPARSE, "dynamic")
    v = layer(poses.u)
    for sample in range(SPARSE.batch):
        u_hat = [
            (layer.weight[kind].T @ poses.u[sample, i]).tolist()
            for (i, _), kind in zip(SPARSE.edges, SPARSE.kinds, strict=True)
        ]
        v_by_hand, _ = route_by_hand(SPARSE.edges, u_hat, SPARSE.children, SPARSE.parents, 3)
        assert_close(v[sample], torch.tensor(v_by_hand, dtype=torch.float64))
    assert v[:, [1, 4]].eq(0).all()  # parents without children


@every_engine
@every_variant
@pytest.mark.parametrize(("children", "parents"), SIZES)
def test_sizes_of_one_odd_and_beyond_128_equal_the_reference(engine, variant, children, parents):
    case = complete(children, parents, parent_dim=5)
    got, expected = both(case, variant, engine)
    assert_equal(got, expected)


def errors_in_units(case, variant, engine, **options):
    """Largest errors in float32 of the layer and of the dense form, in units of the largest."""
    got, dense = both(case, variant, engine, torch.float32, **options)
    _, truth = both(case, variant, "scatter", torch.float64, **options)
    eps = torch.finfo(torch.float32).eps
    for name, right in truth.items():
        unit = eps * max(float(right.abs().max()), 1e-30)
        yield name, *(float((x[name] - right).abs().max()) / unit for x in (got, dense))


@every_engine
@every_variant
@pytest.mark.parametrize(("children", "parents"), [(3, 5), (129, 3), (5, 131), (1152, 10)])
def test_float32_errs_no_more_than_the_dense_form(engine, variant, children, parents):
    """Three times the error of the dense form plus 16 ulp are allowed."""
    if variant.startswith("em") and (children, parents) == (1152, 10):
        pytest.skip("λ · N is then so large that activations jump from 0 to 1 within rounding")
    for name, error, rival in errors_in_units(complete(children, parents), variant, engine):
        assert error <= 3 * rival + 16, f"{name}: {error:.1f} units, the dense form {rival:.1f}"


@every_engine
@pytest.mark.parametrize("variant", ["dynamic", "attention", "em"])
def test_float32_errs_no_more_than_the_dense_form_with_20000_parents(engine, variant):
    case = complete(3, 20_000, batch=1, child_dim=2, parent_dim=2)
    for name, error, rival in errors_in_units(case, variant, engine):
        assert error <= 3 * rival + 16, f"{name}: {error:.1f} units, the dense form {rival:.1f}"


@every_engine
def test_float32_sums_of_100000_children_into_one_of_many_parents(engine):
    """Most parents are isolated; their number must not decide whether sums are taken in parts."""
    children, parents = 100_000, 20_000
    graph = gc.routing_graph(
        torch.arange(children),
        torch.zeros(children, dtype=torch.int64),
        parents=parents,
        weight_index=torch.zeros(children, dtype=torch.int64),
    )
    layer = gc.CapsuleLayer(graph, 2, 2, routing="uniform", engine=engine)
    u = torch.rand(1, children, 2)
    s = torch.einsum("ik,kd->d", u[0].double(), layer.weight[0].double())
    right = gc.squash(s * 1e-5)
    with torch.no_grad():
        layer.weight.mul_(1e-5)
    assert_close(layer(u)[0, 0].double(), right, rtol=1.5e-6, atol=0)


@every_engine
@every_variant
@every_dtype
def test_a_sample_is_routed_alike_alone_and_in_a_batch(engine, variant, dtype):
    for case in (complete(6, 3, batch=5), SPARSE):
        layer, poses = make_layer(case, variant, engine, dtype), make_poses(case, variant, dtype)
        together = route(layer, poses)
        for sample in range(case.batch):
            alone = route(
                layer, Poses(*(x if x is None else x[sample : sample + 1] for x in poses))
            )
            for one, all_of_them in zip(alone, together, strict=True):
                if one is not None:
                    assert_close(one[0], all_of_them[sample])


@every_engine
@every_variant
def test_the_order_of_the_edges_does_not_matter(engine, variant):
    case = SPARSE
    order = [3, 0, 4, 2, 1]
    shuffled = case._replace(
        edges=[case.edges[e] for e in order], kinds=[case.kinds[e] for e in order]
    )
    poses = make_poses(case, variant)
    first, second = (route(make_layer(x, variant, engine), poses) for x in (case, shuffled))
    assert_close(second, first)


@every_engine
@every_variant
def test_names_of_children_and_parents_do_not_matter(engine, variant):
    case = SPARSE
    child, parent = [2, 0, 3, 1], [4, 1, 0, 2, 3]
    renamed = case._replace(edges=[(child[i], parent[j]) for i, j in case.edges])
    layer, other = make_layer(case, variant, engine), make_layer(renamed, variant, engine)
    types = [name for name, p in layer.named_parameters() if "beta_" in name or "bias" in name]
    for name in types:  # one for each parent, which now has another name
        learned = layer.get_parameter(name).detach()
        if len(learned) == case.parents and name != "routing.norm.bias":
            other.get_parameter(name).data[parent] = learned
    poses = make_poses(case, variant)
    moved = Poses(*(x if x is None else torch.empty_like(x) for x in poses))
    for to, x in zip(moved, poses, strict=True):
        if x is not None:
            to[:, child] = x
    for x, y in zip(route(layer, poses), route(other, moved), strict=True):
        if x is not None:
            assert_close(y[:, parent], x)


@every_engine
@every_variant
@every_dtype
def test_routing_is_finite_at_zero_votes(engine, variant, dtype):
    for case in (complete(6, 3), SPARSE):
        layer = make_layer(case, variant, engine, dtype)
        with torch.no_grad():
            layer.weight.zero_()
        poses = with_gradients(make_poses(case, variant, dtype))
        found = results_and_gradients(route(layer, poses), layer, poses)
        for name, x in found.items():
            assert x.isfinite().all(), name


@every_engine
@every_variant
@every_dtype
def test_large_votes_do_not_overflow(engine, variant, dtype):
    """The logits are so large that exp overflows."""
    case = complete(4, 3)
    layer, poses = make_layer(case, variant, engine, dtype), make_poses(case, variant, dtype)
    with torch.no_grad():
        layer.weight.mul_(1e3)
    routed = route(layer, poses)
    assert all(x.isfinite().all() for x in routed if x is not None)


@every_engine
@every_variant
def test_gradients_are_those_of_finite_differences(engine, variant):
    if variant.startswith("dynamic, last"):
        pytest.skip("it leaves out gradients on purpose")
    case = Case(3, 4, [(0, 0), (2, 1), (0, 1), (0, 3), (2, 3)], child_dim=2, parent_dim=3)
    layer = make_layer(case, variant, engine)
    poses = with_gradients(make_poses(case, variant))
    names = [name for name, _ in layer.named_parameters()]
    inputs = [x for x in poses if x is not None]

    def run(*tensors):
        poses, parameters = tensors[: len(inputs)], tensors[len(inputs) :]
        found = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), poses)
        return found if isinstance(found, torch.Tensor) else tuple(found)

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (*inputs, *parameters))


@every_variant
def test_second_derivatives_of_scatter_are_those_of_finite_differences(variant):
    if variant.startswith("dynamic, last"):
        pytest.skip("it leaves out gradients on purpose")
    case = Case(3, 2, [(0, 0), (2, 1), (0, 1), (2, 0)], batch=1, child_dim=2, parent_dim=2)
    layer = make_layer(case, variant, "scatter")
    inputs = [x for x in with_gradients(make_poses(case, variant)) if x is not None]

    def run(*poses):
        found = layer(*poses)
        return found if isinstance(found, torch.Tensor) else tuple(found)

    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("engine", ["fused", "udf", "builtin"])
@pytest.mark.parametrize("variant", ["dynamic", "k-means", "em"])
def test_second_derivatives_that_an_engine_does_not_give_are_refused(engine, variant):
    case = complete(3, 2)
    layer, poses = make_layer(case, variant, engine), with_gradients(make_poses(case, variant))
    (v, _) = route(layer, poses)

    def differentiate_twice():
        (gradient,) = torch.autograd.grad(v.square().sum(), poses.u, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), poses.u)

    with pytest.raises(RuntimeError, match="engine='scatter'"):
        differentiate_twice()


@every_engine
@every_variant
@every_dtype
def test_graphs_of_different_sizes_route_in_one_batch_as_they_would_alone(engine, variant, dtype):
    kinds = 5
    parts = [
        Case(3, 2, [(i, j) for i in range(3) for j in range(2)], 1, [0, 1, 2, 3, 4, 0]),
        Case(5, 4, [(4, 0), (0, 3), (4, 3), (1, 1)], 1, [4, 0, 2, 2]),
        Case(2, 3, [], 1),
        Case(1, 1, [(0, 0)], 1, [1]),
    ]
    own = Case(2, 4, [(0, j % 4) for j in range(kinds)], 1, list(range(kinds)))
    layer = make_layer(own, variant, engine, dtype)
    poses = [make_poses(part, variant, dtype) for part in parts]

    def run(poses, graph):
        a = {} if poses.a is None else {"a": poses.a[0]}
        found = layer(poses.u[0], **a, graph=graph)
        return found if isinstance(found, tuple) else (found,)

    alone = [run(p, part.graph) for p, part in zip(poses, parts, strict=True)]
    a = None if poses[0].a is None else torch.cat([p.a for p in poses], dim=1)
    ragged = Poses(torch.cat([p.u for p in poses], dim=1), a)
    together = run(ragged, dgl.batch([part.graph for part in parts]))
    for place, x in enumerate(together):
        assert_close(x, torch.cat([one[place] for one in alone]))


@every_engine
@every_variant
def test_a_graph_given_for_one_call_routes_as_the_layers_own(engine, variant):
    case = SPARSE._replace(batch=1)
    layer, poses = make_layer(case, variant, engine), with_gradients(make_poses(case, variant))
    expected = results_and_gradients(route(layer, poses), layer, poses)
    found = layer(*(x[0] for x in poses if x is not None), graph=case.graph)
    v, a = found if isinstance(found, tuple) else (found, None)
    routed = Routed(v.unsqueeze(0), a if a is None else a.unsqueeze(0))
    assert_equal(results_and_gradients(routed, layer, poses), expected)


@every_engine
@every_variant
def test_two_edges_between_the_same_nodes_are_two_votes(engine, variant):
    """They compete like the votes for two parents with equal features."""
    twice = gc.routing_graph([0, 0, 0, 1], [0, 0, 1, 1], weight_index=[0, 0, 1, 2])
    layer = gc.CapsuleLayer(twice, 4, 4, routing=VARIANTS[variant].routing, engine=engine)
    other = gc.CapsuleLayer(twice, 4, 4, routing=VARIANTS[variant].routing, engine="scatter")
    other.load_state_dict(layer.state_dict())
    u = torch.randn(2, 2, 4)
    assert_close(layer(u), other(u), rtol=1e-4, atol=1e-5)
    if layer.routing.name == "uniform":
        u_hat = torch.einsum("bk,kd->bd", u[:, 0], layer.weight[0])
        assert_close(layer(u)[:, 0], gc.squash(2 / 3 * u_hat))


@every_engine
@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v].activations])
def test_the_activation_of_a_child_matters(engine, variant):
    case = complete(6, 3)
    layer, poses = make_layer(case, variant, engine), make_poses(case, variant)
    less = poses.a.clone()
    less[:, 2] *= 0.1
    before, after = route(layer, poses), route(layer, Poses(poses.u, less))
    for x, y in zip(before, after, strict=True):
        assert (x - y).abs().max() > 1e-4 * x.abs().max()


@every_engine
@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v].activations])
def test_a_child_without_activation_has_no_part(engine, variant):
    case = complete(6, 3)
    layer, poses = make_layer(case, variant, engine), make_poses(case, variant)
    a = poses.a.clone()
    a[:, 2] = 0
    moved = poses.u.clone()
    moved[:, 2] += 1
    assert_close(route(layer, Poses(moved, a)), route(layer, Poses(poses.u, a)))


@every_engine
def test_scaling_all_activations_leaves_the_first_means_of_em_unchanged(engine):
    case = complete(6, 3)
    layer, poses = make_layer(case, "em", engine, iterations=1), make_poses(case, "em")
    before, after = route(layer, poses), route(layer, Poses(poses.u, 0.3 * poses.a))
    assert_close(after.v, before.v)
    assert not torch.allclose(after.a, before.a)


@every_engine
@pytest.mark.parametrize(("variant", "moves"), [("em", True), ("em, authors", False)])
def test_a_constant_added_to_all_votes_moves_the_means_of_em_by_it_and_nothing_else(
    engine, variant, moves
):
    """The last number of every pose is a constant, which the last row of the matrices adds."""
    case = complete(6, 3)
    layer = make_layer(case, variant, engine)
    constant = torch.tensor([3.0, -2.0, 0.5, 1.0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight[:, -1] = constant
    poses = make_poses(case, variant)
    poses.u[..., -1] = 0
    before = route(layer, poses)
    poses.u[..., -1] = 1
    after = route(layer, poses)
    same = torch.allclose(after.v, before.v + constant) and torch.allclose(after.a, before.a)
    assert same == moves


@every_engine
def test_variances_of_votes_far_from_0_keep_their_digits(engine):
    """In float32, adding the square of 0.01 to that of 30 changes nothing."""
    case = complete(6, 3)
    options = dict(iterations=1, final_inverse_temperature=20.0, min_variance=1e-9)
    layer = make_layer(case, "em", engine, torch.float32, **options)
    truth = make_layer(case, "em", "scatter", torch.float64, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    truth.load_state_dict(layer.state_dict())
    u, a = 30 + 0.01 * torch.randn(2, 6, 4), torch.full((2, 6), 0.1)
    found, right = route(layer, Poses(u, a)), route(truth, Poses(u.double(), a.double()))
    assert_close(found.a.double(), right.a, rtol=1e-4, atol=0)


@every_engine
@every_variant
def test_moving_a_child_changes_only_the_parents_that_its_votes_can_reach(engine, variant):
    """One pass reaches the parents it votes for; all passes reach its connected component."""
    case = Case(4, 5, [(0, 0), (0, 1), (1, 1), (2, 2), (3, 2), (3, 3)])
    layer, poses = make_layer(case, variant, engine), make_poses(case, variant)
    moved = poses.u.clone()
    moved[:, 0] += 1
    before, after = route(layer, poses), route(layer, Poses(moved, poses.a))
    assert torch.equal(after.v[:, [2, 3, 4]], before.v[:, [2, 3, 4]])
    assert (after.v[:, 0] - before.v[:, 0]).abs().max() > 1e-3


OPTIONS = {
    "dynamic": dict(iterations=2, bias=True, leak=True, accumulate=False, temperature=3.0),
    "em": dict(iterations=2, variant="authors", final_inverse_temperature=0.1, min_variance=0.1),
    "attention": dict(iterations=2),
    "variational_bayes": dict(iterations=2, alpha0=2.0, kappa0=2.0, psi0=2.0, nu0=9.0),
}


@pytest.mark.parametrize("engine", ["fused", "scatter"])
@pytest.mark.parametrize(
    ("routing", "option"), [(routing, name) for routing in OPTIONS for name in OPTIONS[routing]]
)
def test_every_option_has_the_effect_that_it_has_in_the_reference(engine, routing, option):
    case = complete(6, 3)
    poses = make_poses(case, routing)
    usual = make_layer(case, routing, engine)
    other = make_layer(case, routing, engine, **{option: OPTIONS[routing][option]})
    other.weight.data.copy_(usual.weight)
    assert_close(route(other, poses), route_densely(other, case, poses)[0])
    assert not torch.allclose(route(other, poses).v, route(usual, poses).v, rtol=1e-3) or (
        not torch.allclose(route(other, poses).a, route(usual, poses).a, rtol=1e-3)
    )


@pytest.mark.parametrize("routing", ["dynamic", "em", "variational_bayes"])
def test_every_option_has_the_default_of_the_reference(routing):
    dense = signature(getattr(reference, f"{routing}_routing")).parameters
    ours = signature(ROUTINGS[routing]).parameters
    numbers = {"iterations", *OPTIONS[routing]} - {"bias"}  # a tensor there, a flag here
    assert {x: ours[x].default for x in numbers} == {x: dense[x].default for x in numbers}


@every_engine_with_votes
@every_variant
def test_coupling_sums_to_one_over_the_parents_of_a_child(engine, variant):
    for case in (complete(6, 3), SPARSE):
        layer, poses = make_layer(case, variant, engine), make_poses(case, variant)
        a = () if poses.a is None else (poses.a,)
        _, trace = layer(poses.u, *a, return_trace=True)
        total = torch.stack([case.dense(c).sum(dim=1) for c in trace.c.flatten(0, 1)])
        has_parents = case.mask.any(dim=1).double().expand(len(total), -1)
        if getattr(layer.routing, "leak", False):
            assert (total <= has_parents + 1e-12).all()
            assert (total < has_parents).any()
        else:
            assert_close(total, has_parents)


@every_engine_with_votes
def test_coupling_starts_equal_in_a_new_layer_with_self_routing(engine):
    layer = gc.CapsuleLayer(gc.complete_graph(6, 4), 3, 5, routing="self_routing", engine=engine)
    _, trace = layer(torch.randn(2, 6, 3), torch.rand(2, 6), return_trace=True)
    assert layer.weight.shape == (6 * 4, 3, 5 + 1)  # the last column makes the logits
    assert not trace.b.any()
    assert_close(trace.c[-1], torch.full_like(trace.c[-1], 1 / 4))


@every_engine_with_votes
def test_a_number_added_to_all_logits_of_a_child_does_not_change_its_coupling(engine):
    passing = gc.bind(gc.batch_graph(SPARSE.graph, 2), engine)
    b = torch.randn(10, 1, dtype=torch.float64)
    c = passing.softmax_over_parents(b)
    for number in (-1e4, 1e4):
        assert_close(passing.softmax_over_parents(b + number), c)
    assert_close(passing.softmax_over_parents(b + 1e4, leak=True), c)
    assert passing.softmax_over_parents(b - 1e4, leak=True).eq(0).all()


@every_engine_with_votes
@every_variant
def test_a_trace_ends_in_the_result_and_in_the_coupling_of_the_reference(engine, variant):
    case = complete(6, 3)
    layer, poses = make_layer(case, variant, engine), make_poses(case, variant)
    a = () if poses.a is None else (poses.a,)
    found, trace = layer(poses.u, *a, return_trace=True)
    expected, c = route_densely(layer, case, poses)
    assert_close(trace.v[-1], found.poses if a else found)
    if a:
        assert_close(trace.a[-1], found.activations)
    assert_close(trace.v[-1], expected.v)
    assert_close(trace.c[-1].view(case.batch, 6, 3), c)


@every_engine
@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_poses_are_routed_in_float32_and_rounded_once(engine, variant, dtype):
    case = complete(5, 300, batch=1)  # more parents than bfloat16 can count
    layer, poses = make_layer(case, variant, engine, dtype), make_poses(case, variant, dtype)
    with torch.no_grad():
        layer.weight.mul_(0.3)
    wide = make_layer(case, variant, engine, torch.float32)
    wide.load_state_dict(layer.state_dict())
    got = route(layer, poses)
    expected = route(wide, Poses(*(x if x is None else x.float() for x in poses)))
    for x, right in zip(got, expected, strict=True):
        if x is not None:
            assert x.dtype == dtype
            assert_close(x, right.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@every_engine
def test_gradients_of_a_matrix_that_many_edges_share_are_summed_in_float32(engine):
    children = 20_000
    child = torch.arange(children).repeat_interleave(2)
    graph = gc.routing_graph(
        child, torch.arange(2).repeat(children), weight_index=torch.zeros(2 * children).long()
    )
    layer = gc.CapsuleLayer(graph, 2, 3, engine=engine, routing="uniform", dtype=torch.bfloat16)
    truth = gc.CapsuleLayer(graph, 2, 3, engine=engine, routing="uniform", dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(1e-3)
        truth.weight.copy_(layer.weight)
    u = torch.rand(1, children, 2).bfloat16()
    layer(u).float().sum().backward()
    truth(u.double()).sum().backward()
    assert_close(layer.weight.grad.double(), truth.weight.grad, rtol=0.01, atol=0)


@every_engine_with_votes
def test_dynamic_and_uniform_routing_are_functions_of_votes_too(engine):
    case = complete(6, 3)
    u_hat = torch.randn(2 * 18, 4, dtype=torch.float64)
    passing = gc.bind(gc.batch_graph(case.graph, 2), engine)
    seen = list(gc.dynamic_routing(passing, u_hat, iterations=4))
    assert len(seen) == 4
    for number, iteration in enumerate(seen, start=1):
        v, c = gc.reference.dynamic_routing(u_hat.view(2, 6, 3, 4), number)
        assert_close(iteration.v.view(v.shape), v)
        assert_close(iteration.c.view(c.shape), c)
        assert_close(iteration.v, gc.squash(iteration.s))
    assert seen[0].b.eq(0).all()
    (only,) = gc.uniform_routing(passing, u_hat)
    assert_close(only.v.view(2, 3, 4), gc.reference.uniform_routing(u_hat.view(2, 6, 3, 4))[0])


@every_engine_with_votes
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(iterations=0), "iterations must be at least 1; got 0"),
        (dict(gradients="al"), "unknown gradients 'al'"),
        (dict(u_hat=torch.zeros(5, 4)), r"each of the 6 edges, \[6, D\]; got \[5, 4\]"),
    ],
)
def test_votes_that_cannot_be_routed_are_refused(engine, changes, said):
    asked = dict(u_hat=torch.zeros(6, 4)) | changes
    with pytest.raises(ValueError, match=said):
        next(gc.dynamic_routing(gc.bind(gc.complete_graph(3, 2), engine), **asked))


@every_engine_with_votes
@given(case=cases())
def test_features_of_nodes_expand_to_each_of_their_edges(engine, case):
    passing = gc.bind(gc.batch_graph(case.graph, case.batch), engine)
    for end, count, expand in (
        (0, case.children, passing.expand_from_children),
        (1, case.parents, passing.expand_from_parents),
    ):
        x = torch.randn(case.batch * count, 2)
        expected = [
            x[sample * count + edge[end]] for sample in range(case.batch) for edge in case.edges
        ]
        got = expand(x)
        assert got.shape == (len(expected), 2)
        assert all(map(torch.equal, got, expected))
