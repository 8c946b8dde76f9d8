"""The pass over the edges on the CPU: values, gradients and laws, for each term and for all."""

import itertools

import pytest
import torch
from couplings import (
    FEATURES,
    FLAGS,
    Graph,
    Sizes,
    complete,
    couple,
    couple_completely,
    couple_densely,
    graphs,
    make_features,
    sizes,
    with_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import kernels
from graphcaps.kernels.cpu import lay_out
from graphcaps.kernels.cpu.by_pose import PosesInLanes
from graphcaps.kernels.cpu.by_sample import SamplesInLanes

EVERYTHING = (FEATURES, FLAGS)
# Each term alone, what published routings ask for, and all at once.
USES = {
    "equal logits": ((), ()),
    **{name: ((name,), ()) for name in FEATURES},
    **{name: (("p",), (name,)) for name in FLAGS},
    "leak of equal logits": ((), ("leak",)),
    "r and p": (("r", "p"), ()),
    "r and q": (("r", "q"), ()),
    "EM": (("a", "k", "q", "r"), ("squares",)),
    "EM's first": (("a", "r"), ("squares",)),
    "self-attention": (("p", "beta"), ()),
    "everything": EVERYTHING,
}

every_use = pytest.mark.parametrize(("names", "flags"), USES.values(), ids=USES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# for each number of lanes, kernels are compiled for some seconds
BATCHES = [
    *((torch.float32, batch) for batch in (1, 15, 16, 17, 32, 33, 48, 49, 64, 65, 129)),
    *((torch.float64, batch) for batch in (1, 16, 60, 128)),
]

IRREGULAR = Graph(
    children=5,
    parents=4,
    edges=[(0, 0, 1), (3, 1, 0), (0, 1, 2), (0, 1, 0), (2, 1, 1), (3, 3, 2), (0, 3, 0), (4, 0, 1)],
    kinds=3,
)  # child 1 has no parent, parent 2 no child; children 2 and 4 have one parent


pytestmark = pytest.mark.usefixtures("several_threads")


def assert_equal(got, expected, **tolerance):
    assert list(got) == list(expected)
    for name, right in expected.items():
        assert_close(got[name], right, msg=lambda said, name=name: f"{name}: {said}", **tolerance)


@given(
    graph=graphs(),
    size=sizes(),
    names=st.sets(st.sampled_from(FEATURES)),
    flags=st.sets(st.sampled_from((*FLAGS, "detach_coupling"))),
)
def test_sums_and_all_gradients_equal_the_dense_form(graph, size, names, flags):
    features = make_features(graph, size, sorted(names), scale=0.5)
    got = with_gradients(couple, graph, size, features, flags)
    expected = with_gradients(couple_densely, graph, size, features, flags)
    assert_equal(got, expected, rtol=1e-9, atol=1e-10)


@every_use
@every_dtype
def test_each_term_equals_the_dense_form(in_lanes, names, flags, dtype):
    size = Sizes(batch=5, rows=2)
    features = make_features(IRREGULAR, size, names, dtype=dtype, scale=0.5)
    got = with_gradients(couple, IRREGULAR, size, features, flags)
    exact = {name: x.double() for name, x in features.items()}
    expected = with_gradients(couple_densely, IRREGULAR, size, exact, flags)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for name, right in expected.items():
        assert got[name].dtype == dtype
        scale = 1 + float(right.abs().max())
        assert_close(got[name].double(), right, rtol=0, atol=tolerance * scale, msg=name)


@every_use
def test_gradients_are_those_of_finite_differences(names, flags):
    size = Sizes(batch=2, rows=2, child_dim=2, parent_dim=2)
    features = make_features(IRREGULAR, size, names, scale=0.5)

    def by_position(*values):
        return couple(IRREGULAR, size, dict(zip(features, values, strict=True)), flags)

    leaves = [x.requires_grad_() for x in features.values()]
    assert torch.autograd.gradcheck(by_position, leaves)


@pytest.mark.parametrize("wanted", ["u", "weight", *FEATURES])
def test_a_gradient_that_alone_is_wanted_is_the_same(in_lanes, wanted):
    size = Sizes(batch=3, rows=2)
    features = make_features(IRREGULAR, size, FEATURES, scale=0.5)
    expected = with_gradients(couple, IRREGULAR, size, features, FLAGS)[f"gradient of {wanted}"]
    alone = features | {wanted: features[wanted].detach().requires_grad_()}
    sums = couple(IRREGULAR, size, alone, FLAGS)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in sums)
    assert_close(torch.autograd.grad(loss, alone[wanted])[0], expected)


def test_nothing_of_a_single_edge_but_its_coupling_depends_on_the_logit():
    """A single edge has a coupling of 1, except with a leak."""
    graph, size = Graph(1, 1, [(0, 0, 0)], 1), Sizes(batch=1)
    features = make_features(graph, size, ("k",))
    for flags, constant in (((), True), (("leak",), False)):
        found = with_gradients(couple, graph, size, features, flags)
        assert found["N"].eq(1).all() == constant
        assert found["gradient of k"].eq(0).all() == constant


@pytest.mark.parametrize(("dtype", "batch"), BATCHES)
def test_any_batch_size_equals_the_dense_form(dtype, batch):
    size = Sizes(batch=batch, rows=2)
    features = make_features(IRREGULAR, size, FEATURES, dtype=dtype, scale=0.3)
    got = with_gradients(couple, IRREGULAR, size, features, FLAGS)
    expected = with_gradients(couple_densely, IRREGULAR, size, features, FLAGS)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for name, right in expected.items():
        assert_close(got[name], right, rtol=0, atol=tolerance * (1 + float(right.abs().max())))


@every_dtype
@pytest.mark.parametrize(
    ("children", "parents", "rows", "dim"),
    [(1, 1, 1, 1), (1, 7, 3, 5), (7, 1, 1, 4), (131, 3, 1, 9), (5, 133, 2, 16), (2, 3, 4, 130)],
)
def test_sizes_of_one_odd_and_beyond_128_equal_the_dense_form(dtype, children, parents, rows, dim):
    graph, size = complete(children, parents, kinds=3), Sizes(3, rows, dim, dim)
    features = make_features(graph, size, FEATURES, dtype=dtype, scale=(3 * dim) ** -0.5)
    got = with_gradients(couple, graph, size, features, FLAGS)
    expected = with_gradients(couple_densely, graph, size, features, FLAGS)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for name, right in expected.items():
        assert_close(got[name], right, rtol=0, atol=tolerance * (1 + float(right.abs().max())))


@pytest.mark.parametrize("batch", [0, 2])
def test_without_samples_or_edges_all_is_zero(batch):
    for graph in (Graph(3, 2, [], 1), Graph(0, 2, [], 0), Graph(3, 0, [], 0), complete(3, 2)):
        size = Sizes(batch=batch)
        features = make_features(graph, size, FEATURES)
        found = with_gradients(couple, graph, size, features, FLAGS)
        assert found["S"].shape == (batch, graph.parents, size.parent_dim)
        for name, x in features.items():
            assert found[f"gradient of {name}"].shape == x.shape
        if batch == 0 or not graph.edges:
            assert all(x.eq(0).all() for x in found.values())


@every_dtype
@pytest.mark.parametrize("others", [9, 69])
def test_a_sample_is_alike_alone_and_in_a_batch_and_never_sees_another(dtype, others):
    """Bitwise if the number of lanes is the same, otherwise within rounding."""
    graph, size = complete(40, 3, kinds=7), Sizes(batch=others + 1, rows=2)
    features = make_features(graph, size, FEATURES, dtype=dtype, scale=0.2)
    together = couple(graph, size, features, FLAGS)
    of_samples = [name for name in features if name not in ("weight", "beta", "prior")]
    for sample in (0, others):
        alone = features | {name: features[name][sample : sample + 1] for name in of_samples}
        for got, right in zip(couple(graph, size, alone, FLAGS), together, strict=True):
            assert_close(got[0], right[sample])
    changed = dict(features)
    for name in of_samples:
        changed[name] = torch.cat([features[name][:1], torch.randn_like(features[name][1:])])
    for got, right in zip(couple(graph, size, changed, FLAGS), together, strict=True):
        assert torch.equal(got[0], right[0])


@every_dtype
@pytest.mark.parametrize("names", [("k",), ("p",), ("q", "r"), FEATURES])
def test_nan_in_one_vote_reaches_all_parents_of_its_child_and_no_other(dtype, names):
    edges = [(0, 0, 0), (0, 1, 1), (1, 1, 2), (1, 2, 2), (2, 3, 2), (3, 4, 3)]
    graph, size = Graph(4, 6, edges, 4), Sizes(batch=3)
    features = make_features(graph, size, names, dtype=dtype)
    finite = couple(graph, size, features, FLAGS)
    for m, ill in ((1, {0, 1}), (3, {4})):
        broken = features | {"weight": features["weight"].clone()}
        broken["weight"][m, 0, 0] = torch.nan
        if names == ("k",) and m == 1:
            ill = {1}  # the logit does not depend on the vote
        for got, right in zip(couple(graph, size, broken, FLAGS), finite, strict=True):
            if got.dim() == 2 and names == ("k",):
                assert torch.equal(got, right)  # nor does N
                continue
            for j in range(graph.parents):
                if j in ill:
                    assert got[:, j].reshape(3, -1).isnan().any(dim=1).all()
                else:
                    assert_close(got[:, j], right[:, j])


@every_dtype
def test_infinite_and_large_logits_do_not_overflow(dtype):
    graph, size = complete(4, 3), Sizes(batch=40)
    features = make_features(graph, size, ("k", "p"), dtype=dtype, scale=1e4)
    features["k"][:, 1] = -torch.inf  # a parent that is off
    found = with_gradients(couple, graph, size, features, FLAGS)
    expected = with_gradients(couple_completely, graph, size, features, FLAGS)
    for name, right in expected.items():
        assert found[name].isfinite().all()
        assert_close(found[name], right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


def test_equal_calls_give_equal_bits():
    graph, size = complete(200, 5, kinds=9), Sizes(batch=40, rows=2)
    features = make_features(graph, size, FEATURES, dtype=torch.float32, scale=0.2)
    first = with_gradients(couple, graph, size, features, FLAGS)
    for _ in range(5):
        again = with_gradients(couple, graph, size, features, FLAGS)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("children", "parents", "kinds", "batch"),
    [
        (1152, 10, None, 40),
        (1, 20_000, None, 16),
        (3, 5000, None, 16),
        (20_000, 2, None, 2),
        (20_000, 2, 3, 2),
        (129, 131, 5, 2),
    ],
)
def test_float32_errs_no_more_than_the_dense_form(children, parents, kinds, batch):
    """By root mean squares; 4 ulp are allowed in addition to the error of the dense form."""
    graph = complete(children, parents, kinds)
    size = Sizes(batch, rows=2, child_dim=4, parent_dim=4)
    features = make_features(graph, size, FEATURES, dtype=torch.float32, scale=0.25)
    for name in ("k", "p", "q", "prior"):  # no child has almost all of its coupling on one edge
        features[name] *= 0.25
    exact = {name: x.double() for name, x in features.items()}
    truth = with_gradients(couple_completely, graph, size, exact, FLAGS)
    dense = with_gradients(couple_completely, graph, size, features, FLAGS)
    kernel = with_gradients(couple, graph, size, features, FLAGS)
    for name, right in truth.items():
        unit = torch.finfo(torch.float32).eps * _mean(right)
        error, allowed = _mean(kernel[name] - right), _mean(dense[name] - right) + 4 * unit
        assert error <= allowed, f"{name}: {error / unit:.1f} units, allowed {allowed / unit:.1f}"


def _mean(x):
    return x.square().mean().sqrt()


@pytest.mark.parametrize("isolated", [0, 50_000])
def test_a_long_sum_is_exact_however_many_parents_stand_beside_it(isolated):
    """One parent has 50,000 one-dimensional votes; some of the others have one or two."""
    children = 50_000
    edges = [(i, 0, 0) for i in range(children)] + [(i, 1 + i, 0) for i in range(isolated // 2)]
    graph, size = Graph(children, 1 + isolated, edges, 1), Sizes(2, 1, 1, 1)
    features = make_features(graph, size, ("a",), dtype=torch.float32)
    features["a"] = 1 + features["a"].abs()
    exact = {name: x.double() for name, x in features.items()}
    vote = exact["weight"][0, 0, 0] * exact["u"][..., 0]
    c = torch.ones(children, dtype=torch.float64)
    c[: isolated // 2] = 0.5
    w = exact["a"] * c
    found = with_gradients(couple, graph, size, features)
    for got, right in ((found["N"], w.sum(1)), (found["S"], (w * vote).sum(1))):
        size_of_terms = w.sum(1) if got.dim() == 2 else (w * vote).abs().sum(1)
        error = (got[:, 0].reshape(2).double() - right).abs() / size_of_terms
        assert error.max() < 4 * torch.finfo(torch.float32).eps


def test_the_gradient_of_a_matrix_that_many_edges_share_is_exact():
    graph, size = complete(10_000, 4, kinds=1), Sizes(1, 1, 2, 2)
    features = make_features(graph, size, dtype=torch.float32)
    features["u"] = 1 + features["u"].abs()
    u, weight = features["u"], features["weight"].requires_grad_()
    _, sums = couple(graph, size, {"u": u, "weight": weight})
    (dweight,) = torch.autograd.grad(sums.sum(), weight)  # each edge gives u / 4
    right = u.double().sum((0, 1)).view(1, 2, 1).expand(1, 2, 2)
    assert ((dweight.double() - right).abs() / right).max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("children", [32, 1152])
def test_a_reference_near_the_mean_keeps_variances_exact(children):
    """`σ² = Q/N − (S/N)²` at mean 10 and σ 0.01."""
    graph, size = complete(children, 3, kinds=1), Sizes(batch=2, rows=1, child_dim=4, parent_dim=4)
    u = 10 + 0.01 * torch.randn(2, children, 4, dtype=torch.float64)
    features = {"u": u.float(), "weight": torch.eye(4).unsqueeze(0)}
    features["a"] = 0.5 + torch.rand(2, children)
    features["r"] = 10 + 0.003 * torch.randn(2, 3, 4)
    votes, a = features["u"].double(), features["a"].double().unsqueeze(-1)
    mean = (a * votes).sum(1) / a.sum(1)
    right = ((a * (votes - mean.unsqueeze(1)).square()).sum(1) / a.sum(1)).unsqueeze(1)
    error = (_variance(couple(graph, size, features, ("squares",))) / right - 1).abs()
    assert error.max() <= 1e-5
    del features["r"]
    error = (_variance(couple(graph, size, features, ("squares",))) / right - 1).abs()
    assert error.max() > 0.01


def _variance(sums):
    total, linear, square = sums
    return square / total.unsqueeze(-1) - (linear / total.unsqueeze(-1)).square()


def test_any_layout_in_memory_is_read_right():
    size = Sizes(batch=4, rows=2)
    features = make_features(IRREGULAR, size, FEATURES)
    expected = with_gradients(couple, IRREGULAR, size, features, FLAGS)
    turned = {
        name: x.mT.contiguous().mT if x.dim() > 1 else torch.stack([x, x], 1)[:, 0]
        for name, x in features.items()
    }
    assert not any(x.is_contiguous() for x in turned.values())
    got = with_gradients(couple, IRREGULAR, size, turned, FLAGS)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(u=torch.zeros(2, 8, 8)), r"expected u as \[batch, 9, 2·K\]; got \[2, 8, 8\]"),
        (dict(u=torch.zeros(2, 9, 7)), r"expected u as \[batch, 9, 2·K\]; got \[2, 9, 7\]"),
        (dict(weight=torch.zeros(27, 3, 5)), r"weight as \[27, 4, D\]; got \[27, 3, 5\]"),
        (dict(weight=torch.zeros(27, 4, 5).double()), "got torch.float32 and torch.float64"),
        (dict(rows=0), "rows must be at least 1; got 0"),
        (dict(a=torch.zeros(2, 8)), r"expected a as \[2, 9\]; got \[2, 8\]"),
        (dict(k=torch.zeros(2, 3, 1)), r"expected k as \[2, 3\]; got \[2, 3, 1\]"),
        (dict(p=torch.zeros(2, 3, 5)), r"expected p as \[2, 3, 10\]; got \[2, 3, 5\]"),
        (dict(q=torch.zeros(2, 3, 10).double()), "expected q in float32 on cpu, .* got float64"),
        (dict(r=torch.zeros(2, 3, 10, device="meta")), "expected r .* got float32 on meta"),
        (dict(beta=torch.zeros(26)), r"expected beta as \[27\]; got \[26\]"),
        (dict(prior=torch.zeros(3)), r"expected prior as \[27\]; got \[3\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes, said):
    asked = dict(u=torch.zeros(2, 9, 8), weight=torch.zeros(27, 4, 5), rows=2) | changes
    size = Sizes(rows=asked.pop("rows"))
    with pytest.raises(ValueError, match=said):
        couple(complete(9, 3), size, asked)


@pytest.mark.parametrize(
    ("batch", "dim", "parents", "competition", "expected"),
    [
        (1, 16, 6, None, PosesInLanes),
        (5, 16, 6, None, PosesInLanes),
        (6, 16, 6, None, SamplesInLanes),
        (64, 16, 6, None, SamplesInLanes),
        (2, 4, 6, None, SamplesInLanes),  # a pose of 4 numbers fills a quarter of its lanes
        (4, 16, 1, None, SamplesInLanes),  # expanding poses would cost as much as the votes
        (64, 16, 2, [0, 1, 0, 1], PosesInLanes),  # the other knows no competition but a child's
    ],
)
def test_the_layout_with_less_work_is_chosen(batch, dim, parents, competition, expected):
    child = torch.arange(2).repeat_interleave(parents)
    graph = gc.routing_graph(child, torch.arange(parents).repeat(2), competition=competition)
    edges = kernels.prepare(graph, 2 * parents, torch.device("cpu"))
    u, weight = torch.zeros(batch, 2, 8), torch.zeros(2 * parents, 8, dim)
    assert type(lay_out.make_parts(u, weight, edges.tensors, parents, 1)) is expected


@pytest.mark.parametrize(("matrices", "expected"), [(1, PosesInLanes), (12, SamplesInLanes)])
def test_many_matrices_are_not_spread_over_the_rows_of_a_pose_for_one_sample(matrices, expected):
    child, parent = torch.arange(2).repeat_interleave(6), torch.arange(6).repeat(2)
    graph = gc.routing_graph(child, parent, weight_index=torch.arange(12) % matrices)
    edges = kernels.prepare(graph, matrices, torch.device("cpu"))
    u, weight = torch.zeros(1, 2, 16), torch.zeros(matrices, 4, 4)
    assert type(lay_out.make_parts(u, weight, edges.tensors, 6, 4)) is expected


def test_threads_have_whole_children_and_whole_competitions():
    """Children 0 and 1 share a competition, and so do 1 and 2, but not 3 and those before."""
    graph = gc.routing_graph(
        [3, 0, 1, 1, 2, 3, 4], [0, 0, 0, 1, 1, 1, 0], competition=[5, 0, 0, 1, 1, 6, 7]
    )
    edges = kernels.prepare(graph, 7, torch.device("cpu"))
    start, cuts = edges.by_competition.start, edges.cuts.tolist()
    children = [
        set(edges.by_competition.child[start[a] : start[b]].tolist())
        for a, b in itertools.pairwise(cuts)
    ]
    assert children == [{0, 1, 2}, {3}, {4}]
