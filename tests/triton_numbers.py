"""Numbers of one pass by the Triton kernels, on a GPU or else in Triton's interpreter.

`test_triton.py` starts these, with TRITON_INTERPRET=1 where there is no GPU: triton must not have
been imported without it.
"""

# ruff: noqa: E741, the letters are those of the formulas

from typing import NamedTuple

import pytest
import torch
from interpreted import DEVICE, assert_near
from torch.testing import assert_close

import graphcaps as gc
from graphcaps.kernels.triton import TritonEdges, arguments, device, gradients, parents
from graphcaps.kernels.triton.couple import couple, couple_backward

INPUTS = ("u", "weight", "a", "k", "p", "q", "beta", "prior")  # in the order of their gradients
TERMS = ("a", "r", "k", "p", "q", "beta", "prior", "leak", "squares")
LOGITS = ("k", "p", "q", "prior")


class Pass(NamedTuple):
    """A graph, the sizes of what passes over it, and which terms there are."""

    graph: object
    terms: tuple = TERMS
    batch: int = 2
    child_dim: int = 3
    parent_dim: int = 5
    rows: int = 1

    @property
    def kinds(self):
        index = self.graph.edata["weight_index"]
        return int(index.max()) + 1 if len(index) else 0

    @property
    def how(self):
        """The arguments after the tensors that have gradients."""
        edges = TritonEdges.of(self.graph, self.kinds, DEVICE)
        flags = (name in self.terms for name in ("leak", "squares", "detach_coupling"))
        return edges.tensors, edges.parents, self.rows, *flags

    def numbers(self, dtype=torch.float32):
        """The inputs, None where absent; and the gradients of N, S and Q."""
        B, P, D = self.batch, self.rows, self.parent_dim
        I, J = (self.graph.num_nodes(end) for end in ("child", "parent"))
        random = {
            "u": torch.randn(B, I, P * self.child_dim),
            "weight": torch.randn(self.kinds, self.child_dim, D) / self.child_dim**0.5,
            "a": torch.rand(B, I),
            "r": torch.randn(B, J, P * D),
            "k": torch.randn(B, J),
            # logits of a few: c errs by the rounding of a logit, which dense softmax may not
            "p": torch.randn(B, J, P * D) / (P * D) ** 0.5,
            "q": torch.randn(B, J, P * D) / (P * D),
            "beta": torch.randn(self.kinds),
            "prior": torch.randn(self.kinds),
        }
        inputs = {
            name: x.to(DEVICE, dtype) if name in ("u", "weight", *self.terms) else None
            for name, x in random.items()
        }
        sums = (torch.randn(B, J), torch.randn(B, J, P * D), torch.randn(B, J, P * D))
        return inputs, tuple(x.to(DEVICE) for x in sums)


def by_pass(case, inputs, of_sums):
    """N, S, Q and the gradients of the inputs that are there."""
    values, how = tuple(inputs.values()), case.how
    N, S, Q, kept = couple(*values, *how)
    has = {name: x is not None for name, x in inputs.items()}
    needed = has | dict(k=has["k"] or has["r"], p=has["p"] or has["r"])  # what dr is made of
    del needed["r"]
    detached = "detach_coupling" in case.terms
    needed |= dict.fromkeys(LOGITS, False) if detached else {}
    of_all = couple_backward(*of_sums, kept, *values, *how, list(needed.values()))
    found = dict(zip(needed, of_all, strict=True))
    if has["r"]:
        _, dS, dQ = of_sums
        found["r"] = -N[..., None] * dS - (2 * dQ * S if Q.numel() else 0)
        if has["p"] and not detached:
            found["r"] -= inputs["p"] * found["k"][..., None]
        if has["q"] and not detached:
            found["r"] -= 2 * inputs["q"] * found["p"]
    if detached:
        assert not any(found[name].numel() for name in LOGITS)
        found |= {name: torch.zeros_like(inputs[name]) for name in LOGITS if has[name]}
    wanted = {f"d{name}": found[name] for name in inputs if has[name]}
    return dict(N=N, S=S) | (dict(Q=Q) if Q.numel() else {}) | wanted


def densely(case, inputs, of_sums, dtype=torch.float64):
    """The same from votes that are there, by autograd."""
    child, parent = (ends.long() for ends in case.graph.edges())
    kind = case.graph.edata["weight_index"]
    ends = torch.nn.functional.one_hot(parent, case.graph.num_nodes("parent")).to(dtype)
    x = {
        name: value if value is None else value.detach().cpu().to(dtype).requires_grad_()
        for name, value in inputs.items()
    }
    rows = x["u"][:, child].unflatten(2, (case.rows, -1))
    y = torch.einsum("bepk,ekd->bepd", rows, x["weight"][kind]).flatten(2)
    y = y if x["r"] is None else y - x["r"][:, parent]
    b = y.new_zeros(y.shape[:2])
    b = b if x["prior"] is None else b + x["prior"][kind]
    b = b if x["k"] is None else b + x["k"][:, parent]
    b = b if x["p"] is None else b + (x["p"][:, parent] * y).sum(2)
    b = b if x["q"] is None else b + (x["q"][:, parent] * y**2).sum(2)
    w = torch.zeros_like(b)
    for node in child.unique():
        mine = child == node
        logits = torch.nn.functional.pad(b[:, mine], (0, int("leak" in case.terms)))
        w = w.masked_scatter(mine, logits.softmax(1)[:, : mine.sum()])
    w = w.detach() if "detach_coupling" in case.terms else w
    w = w if x["beta"] is None else w + x["beta"][kind]
    w = w if x["a"] is None else w * x["a"][:, child]
    sums = {
        "N": torch.einsum("be,ej->bj", w, ends),
        "S": torch.einsum("be,bed,ej->bjd", w, y, ends),
        "Q": torch.einsum("be,bed,ej->bjd", w, y**2, ends),
    }
    if "squares" not in case.terms:
        del sums["Q"]
    total = sum((s * d.cpu().to(dtype)).sum() for s, d in zip(sums.values(), of_sums, strict=False))
    there = {name: value for name, value in x.items() if value is not None}
    found = torch.autograd.grad(total, tuple(there.values()), materialize_grads=True)
    return {k: v.detach() for k, v in sums.items()} | {
        f"d{name}": value for name, value in zip(there, found, strict=True)
    }


# A child without parents, a parent without children, twice an edge between the same nodes, matrices
# that are shared, and one that is not used
MIXED = gc.routing_graph(
    [2, 0, 0, 0], [0, 1, 0, 1], children=3, parents=3, weight_index=[1, 0, 1, 3]
)


def every_three_of(terms):
    """24 choices in which any three terms come in each of their 8 combinations."""
    row = "++-+++---+-"  # Plackett and Burman 1946, 12 runs
    runs = [row[-shift:] + row[:-shift] for shift in range(11)] + ["-" * 11]
    for sign in "+-":
        for run in runs:
            yield tuple(t for t, there in zip(terms, run, strict=False) if there == sign)


@pytest.mark.parametrize(
    "terms", list(every_three_of((*TERMS, "rows", "detach_coupling"))), ids=" ".join
)
def test_a_pass_equals_the_dense_form_whatever_its_terms(terms):
    rows, parent_dim = (3, 2) if "rows" in terms else (1, 5)
    case = Pass(MIXED, terms, rows=rows, parent_dim=parent_dim)
    numbers = case.numbers()
    rival = densely(case, *numbers, dtype=torch.float32)
    assert_near(by_pass(case, *numbers), densely(case, *numbers), rival)


TINY = gc.routing_graph([0, 0, 1], [0, 1, 1], weight_index=[0, 1, 1])


@pytest.mark.parametrize(
    "case",
    [
        Pass(gc.complete_graph(1, 1), batch=1, child_dim=1, parent_dim=1),
        Pass(TINY, batch=2, child_dim=37, parent_dim=3),  # more of K than a block
        Pass(TINY, batch=1, child_dim=3, parent_dim=130),
        Pass(TINY, batch=1, child_dim=2, parent_dim=1, rows=17),
    ],
    ids=["sizes of 1", "long poses", "long outputs", "many rows"],
)
def test_a_pass_of_odd_sizes_equals_the_dense_form(case):
    numbers = case.numbers()
    rival = densely(case, *numbers, dtype=torch.float32)
    assert_near(by_pass(case, *numbers), densely(case, *numbers), rival)


def test_samples_beyond_a_block_and_sums_cut_into_parts_equal_the_dense_form(monkeypatch):
    monkeypatch.setattr(arguments, "TILE", 128)
    monkeypatch.setattr(parents, "EDGES_OF_PART", 1)
    case = Pass(TINY, batch=17, parent_dim=2)
    assert arguments.sizes(17, 3, 2).BLOCK_B.value == 16
    numbers = case.numbers()
    rival = densely(case, *numbers, dtype=torch.float32)
    assert_near(by_pass(case, *numbers), densely(case, *numbers), rival)


def test_a_pass_over_bfloat16_errs_by_the_rounding_of_its_gradients():
    """Inputs are exact in float32, so are sums; what is in bfloat16 is rounded once."""
    case = Pass(TINY)
    numbers = case.numbers(torch.bfloat16)
    got, truth = by_pass(case, *numbers), densely(case, *numbers)
    kept = {name for name, x in got.items() if x.dtype == torch.float32}
    assert kept == {"N", "S", "Q", "dr", "dk", "dp", "dq", "dbeta", "dprior"}
    rival = densely(case, *numbers, dtype=torch.float32)
    exact = [{n: x for n, x in f.items() if n in kept} for f in (got, truth, rival)]
    rounded = [{n: x for n, x in f.items() if n not in kept} for f in (got, truth)]
    assert_near(*exact)
    assert_near(*rounded, units=1)


def test_equal_passes_give_equal_bits_and_a_sample_the_same_alone(monkeypatch):
    monkeypatch.setattr(parents, "EDGES_OF_PART", 1)
    case = Pass(TINY)
    inputs, of_sums = case.numbers()
    once, again = (by_pass(case, inputs, of_sums) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)
    shared = ("weight", "beta", "prior")
    alone = {name: x if name in shared else x[1:] for name, x in inputs.items()}
    found = by_pass(case._replace(batch=1), alone, tuple(x[1:] for x in of_sums))
    for name, x in found.items():
        if name.removeprefix("d") not in shared:
            assert_close(x[0], once[name][1], rtol=1e-6, atol=1e-7)


def test_inputs_of_a_pass_need_not_be_contiguous():
    case = Pass(TINY)
    inputs, of_sums = case.numbers()
    strided = {name: torch.stack((x, x), -1)[..., 0] for name, x in inputs.items() if x is not None}
    twice = tuple(torch.stack((x, x), -1)[..., 0] for x in of_sums)
    got, right = by_pass(case, strided, twice), by_pass(case, inputs, of_sums)
    assert all(torch.equal(got[name], right[name]) for name in right)


@pytest.mark.parametrize(
    "case", [Pass(gc.routing_graph([], [], children=3, parents=2)), Pass(TINY, batch=0)]
)
def test_where_nothing_passes_there_are_zeros(case):
    inputs, of_sums = case.numbers()
    for name, x in by_pass(case, inputs, of_sums).items():
        assert torch.equal(x, torch.zeros_like(x)), name


def test_gradients_that_are_not_needed_have_size_0_and_are_not_computed(monkeypatch):
    launched, right = [], device.launch

    def launch(kernel, *args, **how):
        launched.append(kernel)
        right(kernel, *args, **how)

    monkeypatch.setattr(device, "launch", launch)
    case = Pass(TINY, batch=1)
    inputs, of_sums = case.numbers()
    values, how = tuple(inputs.values()), case.how
    kept = couple(*values, *how)[3]
    every = couple_backward(*of_sums, kept, *values, *how, [True] * 8)
    kernels = {
        "u": gradients.gradient_of_poses_kernel,
        "weight": gradients.gradients_of_kinds_kernel,
        "p": parents.partial_sums_kernel,
    }
    for name, kernel in kernels.items():
        launched.clear()
        needed = [other == name for other in INPUTS]
        found = couple_backward(*of_sums, kept, *values, *how, needed)
        assert [x.numel() > 0 for x in found] == needed
        assert torch.equal(found[INPUTS.index(name)], every[INPUTS.index(name)])
        assert kernel in launched
        assert not set(launched) & (set(kernels.values()) - {kernel})


def coupled_through(graph, weight, of_sums=(), wanted=(), terms=(), **features):
    """N, S, Q and some gradients, one number each, for a sample with poses 1: W is the votes."""
    edges = TritonEdges.of(graph, len(weight), DEVICE)
    given = dict(u=torch.ones(1, edges.children, 1), weight=weight.view(-1, 1, 1), **features)
    given = {name: x.to(DEVICE) for name, x in given.items()}
    values = [given.get(name) for name in ("u", "weight", "a", "r", "k", "p", "q", "beta", "prior")]
    how = (edges.tensors, edges.parents, 1, "leak" in terms, True, False)
    N, S, Q, kept = couple(*values, *how)
    found = dict(N=N, S=S, Q=Q)
    if wanted:
        dN, dS = (x.to(DEVICE) for x in of_sums)
        needed = [name in wanted for name in INPUTS]
        of_all = couple_backward(dN, dS, torch.zeros_like(dS), kept, *values, *how, needed)
        found |= zip(INPUTS, of_all, strict=True)
    return {name: x.cpu().double().flatten() for name, x in found.items()}


MANY, SMALL = 70, 2.0**-25  # terms, each of which float32 loses beside 1


def one_and_many_small():
    return torch.tensor([1.0] + [SMALL] * MANY)


def assert_exact(found, right):
    """To 12 units: one long sum of the above loses 17, one of groups of 32 loses 8."""
    assert_close(found, torch.full_like(found, right), rtol=12 * 2.0**-23, atol=0)


def test_a_softmax_over_many_parents_loses_no_digits():
    """The first edge's exp is 1, those of the others are small."""
    graph = gc.routing_graph([0] * (MANY + 1), [0] + [1] * MANY)
    N = coupled_through(graph, torch.ones(MANY + 1), prior=one_and_many_small().log())["N"]
    assert_exact(N[0], 1 / (1 + MANY * SMALL))


def test_sums_of_many_children_lose_no_digits(monkeypatch):
    """Not those of a parent, nor of a kind of edges."""
    monkeypatch.setattr(parents, "EDGES_OF_PART", MANY + 1)
    monkeypatch.setattr(device, "PROGRAMS", 1)
    edges = range(MANY + 1)
    graph = gc.routing_graph(edges, [0 for _ in edges], weight_index=[0 for _ in edges])
    zero, a = torch.zeros(1), one_and_many_small().view(1, -1)
    # with the leak, c = 1/2; then w = a/2, g = 3 and λ = a c (1 − c) g
    of_sums, wanted = (torch.ones(1, 1), torch.full((1, 1, 1), 2.0)), ("weight", "beta", "prior")
    found = coupled_through(
        graph, torch.ones(1), of_sums, wanted, ("leak",), a=a, beta=zero, prior=zero
    )
    total = 1 + MANY * SMALL
    for name, factor in (("N", 1 / 2), ("S", 1 / 2), ("Q", 1 / 2)):
        assert_exact(found[name], factor * total)
    for name, factor in (("weight", 1.0), ("beta", 3.0), ("prior", 3 / 4)):
        assert_exact(found[name], factor * total)


def test_gradients_from_many_parents_lose_no_digits():
    """Those of a child's pose and activation, of which one edge has most."""
    graph = gc.routing_graph([0] * (MANY + 1), range(MANY + 1))
    dS = ((MANY + 1) * one_and_many_small()).view(1, -1, 1)
    found = coupled_through(
        graph,
        torch.ones(MANY + 1),
        (torch.zeros(1, MANY + 1), dS),
        ("u", "a"),
        a=torch.ones(1, 1),
        beta=torch.zeros(MANY + 1),
    )
    assert_exact(found["u"], 1 + MANY * SMALL)
    assert_exact(found["a"], 1 + MANY * SMALL)


def test_parts_of_a_sum_lose_no_digits():
    partial = one_and_many_small().to(DEVICE)[:, None].repeat(1, 3)
    assert_exact(parents.add_parts(partial).cpu().double(), 1 + MANY * SMALL)


def test_a_variance_keeps_its_digits_near_the_reference_point():
    """Relative error of Q/N − (S/N)² at most 1e-5 at mean 10 and standard deviation 0.01."""
    votes = 10 + 0.01 * torch.randn(50)
    graph = gc.routing_graph(range(50), [0] * 50)
    found = coupled_through(graph, votes, r=torch.full((1, 1, 1), 10.003))
    N, S, Q = (found[name] for name in ("N", "S", "Q"))
    truth = votes.double().var(correction=0)
    assert_close(Q / N - (S / N) ** 2, truth.view(1), rtol=1e-5, atol=0)


def test_logits_far_beyond_the_range_of_exp_couple_as_softmax_does():
    """The first is −∞, as the logarithm of an activation that is 0."""
    graph = gc.routing_graph([0] * 4, range(4))
    k = torch.tensor([[float("-inf"), -900.0, 901.0, 900.0]])
    N = coupled_through(graph, torch.ones(4), k=k)["N"]
    assert_close(N, k[0].double().softmax(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", ["weight", "u", "k", "prior"])
def test_nan_in_one_vote_reaches_every_parent_of_its_child_and_no_other(place):
    graph = gc.routing_graph([0, 0, 0, 1, 1], [0, 1, 2, 2, 3])
    case = Pass(graph, ("p", "k", "prior", "squares"))
    inputs, of_sums = case.numbers()
    inputs[place].view(-1)[0] = torch.nan  # child, parent and edge 0, and for u and k one sample
    found = by_pass(case, inputs, of_sums)
    samples = 2 if place in ("weight", "prior") else 1
    for name in ("N", "S", "Q"):
        assert found[name][:samples, :3].isnan().all(), name
        assert found[name][:, 3].isfinite().all(), name
        assert found[name][samples:].isfinite().all(), name
    assert found["du"][:samples, 0].isnan().all()
    assert found["du"][:, 1].isfinite().all() or place == "k"


def test_a_logit_that_rounding_lifts_over_the_greatest_couples_no_more_than_it():
    graph = gc.routing_graph([0, 0], [0, 1])
    case = Pass(graph, ("a", "k"), 1, 1, 1)
    inputs, _ = case.numbers()
    inputs["k"].zero_()
    dN = torch.ones(1, 2, device=DEVICE)
    dS = torch.zeros(1, 2, 1, device=DEVICE)
    values = tuple(inputs.values())
    kept = couple(*values, *case.how)[3]
    assert kept.flatten().tolist() == [0, 2]  # the greatest logit, and the sum of exp
    kept[0] -= 1
    needed = [name == "a" for name in INPUTS]
    da = couple_backward(dN, dS, dS, kept, *values, *case.how, needed)[2]
    assert_close(da.cpu(), torch.ones(1, 1))
