"""The dense reference against loops over Python floats, values computed by hand, and laws."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from by_hand import (
    attention_by_hand,
    digamma_by_hand,
    em_by_hand,
    route_by_hand,
    self_attention_by_hand,
    self_routing_by_hand,
    variational_bayes_by_hand,
)
from torch import Tensor
from torch.testing import assert_close

from graphcaps import reference


class Inputs(NamedTuple):
    """Random numbers for any routing on one graph."""

    mask: Tensor
    u_hat: Tensor
    a: Tensor
    logits: Tensor
    beta: Tensor
    beta_a: Tensor
    beta_u: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    @classmethod
    def draw(cls, mask: Tensor, dim: int, batch: int = 2) -> "Inputs":
        children, parents = mask.shape

        def normal(*size):
            return torch.randn(*size, dtype=torch.float64)

        return cls(
            mask,
            u_hat=normal(batch, children, parents, dim),
            a=torch.rand(batch, children, dtype=torch.float64),
            logits=normal(batch, children, parents),
            beta=normal(children, parents),
            beta_a=normal(parents),
            beta_u=normal(parents),
            bias=normal(parents, dim),
            norm_weight=normal(dim),
            norm_bias=normal(dim),
        )

    def to(self, dtype) -> "Inputs":
        return Inputs(self.mask, *(tensor.to(dtype) for tensor in self[1:]))


class Form(NamedTuple):
    """A routing with its options: dense, and by hand from edges, sizes and lists."""

    dense: Callable
    by_hand: Callable

    def apart(self, x: Inputs, sample: int):
        """By hand for one sample, as tensors, the coupling `[I, J]`."""
        edges = x.mask.nonzero().tolist()
        sizes = x.mask.shape
        v, c, *a = self.by_hand(edges, sizes, _on_edges(x, sample))
        coupling = torch.zeros(sizes, dtype=torch.float64)
        coupling[x.mask] = torch.tensor(c, dtype=torch.float64)
        return [torch.tensor(part, dtype=torch.float64) for part in (v, coupling.tolist(), *a)]


class Lists(NamedTuple):
    """The `Inputs` of one sample, on edges, as lists."""

    u_hat: list
    a: list
    logits: list
    beta: list
    beta_a: list
    beta_u: list
    bias: list
    norm_weight: list
    norm_bias: list


def _on_edges(x: Inputs, sample: int) -> Lists:
    tensors = x._replace(
        u_hat=x.u_hat[sample][x.mask],
        a=x.a[sample],
        logits=x.logits[sample][x.mask],
        beta=x.beta[x.mask],
    )
    return Lists(*(tensor.tolist() for tensor in tensors[1:]))


def _dynamic(iterations, bias=False, **options):
    return Form(
        lambda x: reference.dynamic_routing(
            x.u_hat, iterations, mask=x.mask, bias=x.bias if bias else None, **options
        ),
        lambda edges, sizes, x: route_by_hand(
            edges, x.u_hat, *sizes, iterations, bias=x.bias if bias else None, **options
        ),
    )


def _uniform(bias):
    return Form(
        lambda x: reference.uniform_routing(x.u_hat, mask=x.mask, bias=x.bias if bias else None),
        lambda edges, sizes, x: route_by_hand(
            edges, x.u_hat, *sizes, 1, bias=x.bias if bias else None
        ),
    )


def _attention(iterations, eps=1e-5):
    return Form(
        lambda x: reference.inverted_attention_routing(
            x.u_hat,
            iterations,
            mask=x.mask,
            norm_weight=x.norm_weight,
            norm_bias=x.norm_bias,
            eps=eps,
        ),
        lambda edges, sizes, x: attention_by_hand(
            edges, x.u_hat, *sizes, iterations, x.norm_weight, x.norm_bias, eps
        ),
    )


def _self_attention(beta):
    return Form(
        lambda x: reference.self_attention_routing(x.u_hat, x.beta if beta else None, mask=x.mask),
        lambda edges, sizes, x: self_attention_by_hand(
            edges, x.u_hat, *sizes, x.beta if beta else [0.0] * len(edges)
        ),
    )


def _em(iterations, variant, final=0.01, min_variance=5e-4):
    return Form(
        lambda x: reference.em_routing(
            x.u_hat,
            x.a,
            x.beta_a,
            x.beta_u,
            iterations,
            mask=x.mask,
            variant=variant,
            final_inverse_temperature=final,
            min_variance=min_variance,
        ),
        lambda edges, sizes, x: em_by_hand(
            edges,
            x.u_hat,
            x.a,
            x.beta_a,
            x.beta_u,
            *sizes,
            iterations,
            variant,
            final,
            min_variance,
        ),
    )


def _variational_bayes(iterations, **priors):
    return Form(
        lambda x: reference.variational_bayes_routing(
            x.u_hat, x.a, x.beta_a, x.beta_u, iterations, mask=x.mask, **priors
        ),
        lambda edges, sizes, x: variational_bayes_by_hand(
            edges, x.u_hat, x.a, x.beta_a, x.beta_u, *sizes, iterations, **priors
        ),
    )


FORMS = {
    "dynamic, one iteration": _dynamic(1),
    "dynamic": _dynamic(3),
    "dynamic, five iterations": _dynamic(5),
    "dynamic with bias": _dynamic(3, bias=True),
    "dynamic with leak": _dynamic(3, leak=True),
    "dynamic with bias and leak": _dynamic(3, bias=True, leak=True),
    "dynamic, tempered": _dynamic(3, temperature=0.5),
    "dynamic, not accumulated": _dynamic(4, accumulate=False, temperature=0.3),
    "uniform": _uniform(bias=False),
    "uniform with bias": _uniform(bias=True),
    "attention, one iteration": _attention(1),
    "attention": _attention(2),
    "attention, four iterations": _attention(4, eps=0.01),
    "self_attention": _self_attention(beta=True),
    "self_attention without priors": _self_attention(beta=False),
    "self_routing": Form(
        lambda x: reference.self_routing(x.u_hat, x.a, x.logits, mask=x.mask),
        lambda edges, sizes, x: self_routing_by_hand(edges, x.u_hat, x.a, x.logits, *sizes),
    ),
    "em, one iteration": _em(1, "paper"),
    "em": _em(3, "paper"),
    "em, wide and decided": _em(3, "paper", final=5.0, min_variance=0.1),
    "em as coded, one iteration": _em(1, "authors"),
    "em as coded": _em(3, "authors"),
    "em as coded, wide and decided": _em(4, "authors", final=0.002, min_variance=0.1),
    "variational_bayes, one iteration": _variational_bayes(1),
    "variational_bayes": _variational_bayes(3),
    "variational_bayes with priors": _variational_bayes(
        3, alpha0=0.5, m0=0.7, kappa0=2.0, psi0=0.3, nu0=8.5
    ),
}
WITH_ACTIVATIONS = [name for name in FORMS if name.startswith(("em", "self_r", "variational"))]

GRAPHS = {
    "one edge": (torch.ones(1, 1, dtype=torch.bool), 1),
    "complete": (torch.ones(4, 3, dtype=torch.bool), 2),
    "many children": (torch.ones(7, 2, dtype=torch.bool), 5),
    # the second child has no parents, the second parent no children
    "sparse": (
        torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [1, 0, 1, 1]]) > 0,
        3,
    ),
}


def draw(graph: str) -> Inputs:
    mask, dim = GRAPHS[graph]
    return Inputs.draw(mask, dim)


@pytest.fixture(params=FORMS)
def form(request) -> Form:
    return FORMS[request.param]


@pytest.fixture(params=WITH_ACTIVATIONS)
def activated(request) -> Form:
    return FORMS[request.param]


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_routing_equals_its_paper_in_loops(form, graph):
    x = draw(graph)
    dense = form.dense(x)
    for sample in range(len(x.u_hat)):
        for got, expected in zip(dense, form.apart(x, sample), strict=True):
            assert_close(got[sample], expected, rtol=1e-9, atol=1e-9)


def test_digamma_by_hand_is_exact():
    gamma = 0.5772156649015329
    assert digamma_by_hand(1) == pytest.approx(-gamma, rel=1e-14)
    assert digamma_by_hand(0.5) == pytest.approx(-gamma - 2 * math.log(2), rel=1e-14)
    assert digamma_by_hand(5) == pytest.approx(1 + 1 / 2 + 1 / 3 + 1 / 4 - gamma, rel=1e-14)
    assert digamma_by_hand(100.5) == pytest.approx(
        2 * sum(1 / (2 * k - 1) for k in range(1, 101)) - gamma - 2 * math.log(2), rel=1e-14
    )


def test_every_routing_by_name():
    assert list(reference.ROUTINGS) == [
        "dynamic",
        "uniform",
        "em",
        "attention",
        "self_attention",
        "self_routing",
        "variational_bayes",
    ]
    for name in reference.ROUTINGS:
        assert any(form.startswith(name) for form in FORMS), f"{name} is not tested here"


@pytest.mark.parametrize("graph", ["complete", "sparse"])
def test_gradients_are_those_of_finite_differences(form, graph):
    x = draw(graph)
    leaves = [tensor.requires_grad_() for tensor in x[1:]]
    assert torch.autograd.gradcheck(lambda *tensors: form.dense(Inputs(x.mask, *tensors)), leaves)


def test_gradients_of_the_last_iteration_alone_stop_before_it():
    u_hat = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    v, c = reference.dynamic_routing(u_hat, 3, gradients="last", bias=bias)
    last = reference.squash(torch.einsum("bij,bijd->bjd", c.detach(), u_hat) + bias)
    inputs = (u_hat, bias)
    got = torch.autograd.grad(v.square().sum(), inputs)
    assert_close(got, torch.autograd.grad(last.square().sum(), inputs))


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-10])
def test_the_exponential_squash_is_the_identity_near_zero(length):
    s = torch.tensor([0.6, -0.8]) * length
    jacobian = torch.autograd.functional.jacobian(reference.exponential_squash, s)
    assert_close(jacobian, torch.eye(2))


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_coupling_sums_to_one_over_the_parents_of_a_child(form, graph):
    x = draw(graph)
    c = form.dense(x)[1]
    total = c.sum(dim=2)
    has_parents = x.mask.any(dim=1)
    assert c[:, ~x.mask].eq(0).all()
    assert (c >= 0).all()
    if form in (FORMS["dynamic with leak"], FORMS["dynamic with bias and leak"]):
        assert ((total[:, has_parents] > 0) & (total[:, has_parents] < 1)).all()
    else:
        assert_close(total, has_parents.double().expand_as(total))


def test_a_leak_is_one_more_parent_for_which_all_vote_zero():
    u_hat = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    nothing = torch.zeros(2, 5, 1, 4, dtype=torch.float64)
    v, c = reference.dynamic_routing(torch.cat([u_hat, nothing], dim=2), 4)
    leaky_v, leaky_c = reference.dynamic_routing(u_hat, 4, leak=True)
    assert_close(leaky_v, v[:, :3])
    assert_close(leaky_c, c[:, :, :3])


def test_votes_where_no_edge_is_change_nothing(form):
    x = draw("sparse")
    elsewhere = ~x.mask.unsqueeze(-1)
    other = x._replace(
        u_hat=torch.where(elsewhere, 100 * torch.randn_like(x.u_hat), x.u_hat),
        logits=torch.where(x.mask, x.logits, 1e3),
        beta=torch.where(x.mask, x.beta, 1e3),
    )
    assert_close(form.dense(other), form.dense(x))
    u_hat = x.u_hat.clone().requires_grad_()
    form.dense(x._replace(u_hat=u_hat))[0].sum().backward()
    assert u_hat.grad[:, ~x.mask].eq(0).all()


def test_a_sample_is_routed_alike_alone_and_in_a_batch(form):
    x = Inputs.draw(GRAPHS["sparse"][0], dim=3, batch=4)
    alone = x._replace(u_hat=x.u_hat[2:3], a=x.a[2:3], logits=x.logits[2:3])
    for got, in_batch in zip(form.dense(alone), form.dense(x), strict=True):
        assert_close(got[0], in_batch[2])


def test_every_routing_is_finite_at_zero_votes(form):
    x = draw("sparse").to(torch.float32)
    x = x._replace(u_hat=torch.zeros_like(x.u_hat), bias=torch.zeros_like(x.bias))
    leaves = [tensor.requires_grad_() for tensor in x[1:]]
    out = form.dense(x)
    sum(part.sum() for part in out).backward()
    assert all(part.isfinite().all() for part in out)
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


def test_every_routing_is_finite_where_no_child_is_active(activated):
    x = draw("sparse").to(torch.float32)
    x = x._replace(a=torch.zeros_like(x.a))
    leaves = [tensor.requires_grad_() for tensor in x[1:]]
    out = activated.dense(x)
    sum(part.sum() for part in out).backward()
    assert all(part.isfinite().all() for part in out)
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("name", [n for n in reference.ROUTINGS if n != "attention"])
def test_zero_votes_give_zero_poses(name):
    x = draw("sparse")
    assert FORMS[name].dense(x._replace(u_hat=torch.zeros_like(x.u_hat)))[0].eq(0).all()


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_large_votes_do_not_overflow(form, scale):
    x = draw("sparse").to(torch.float32)
    x = x._replace(u_hat=scale * x.u_hat)
    leaves = [tensor.requires_grad_() for tensor in x[1:]]
    out = form.dense(x)
    sum(part.sum() for part in out).backward()
    assert all(part.isfinite().all() for part in out)
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize(("name", "beta_a"), [("em", -1e6), ("em as coded", 1e6)])
def test_em_is_finite_where_no_parent_is_active(name, beta_a):
    x = draw("complete").to(torch.float32)
    x = x._replace(beta_a=torch.full_like(x.beta_a, beta_a), u_hat=x.u_hat.requires_grad_())
    v, c, a = FORMS[name].dense(x)
    v.sum().backward()
    assert a.eq(0).all()
    assert v.isfinite().all() and x.u_hat.grad.isfinite().all()
    assert_close(c.sum(dim=2), torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_result_has_the_dtype_of_the_votes(form, dtype):
    out = form.dense(draw("sparse").to(dtype))
    assert all(part.dtype == dtype and part.isfinite().all() for part in out)


def test_a_constant_added_to_all_votes_moves_the_means_of_em_and_nothing_else():
    x = draw("complete")
    form = FORMS["em, wide and decided"]
    shift = torch.tensor([3.0, -20.0], dtype=torch.float64)
    mu, c, a = form.dense(x)
    moved_mu, moved_c, moved_a = form.dense(x._replace(u_hat=x.u_hat + shift))
    assert_close(moved_mu, mu + shift)
    assert_close((moved_c, moved_a), (c, a))


def test_a_constant_added_to_all_votes_and_the_prior_mean_moves_the_means_of_variational_bayes():
    x = draw("sparse")
    shift = torch.tensor([3.0, -20.0, 0.5], dtype=torch.float64)
    m, c, a = _variational_bayes(3).dense(x)
    moved = x._replace(u_hat=x.u_hat + shift)
    moved_m, moved_c, moved_a = _variational_bayes(3, m0=shift).dense(moved)
    assert_close(moved_m, m + shift)
    assert_close((moved_c, moved_a), (c, a))


def test_scaling_all_activations_leaves_the_first_means_of_em_and_self_routing_unchanged():
    x = draw("sparse")
    scaled = x._replace(a=0.3 * x.a)
    em = FORMS["em, one iteration"]
    assert_close(em.dense(scaled).v, em.dense(x).v)
    self_routing = FORMS["self_routing"]
    assert_close(self_routing.dense(scaled), self_routing.dense(x))


def test_a_child_of_activation_zero_has_no_say(activated):
    x = draw("sparse")
    silent = x._replace(a=x.a * torch.tensor([1.0, 1, 1, 0, 1], dtype=torch.float64))
    without = silent._replace(
        mask=x.mask & torch.tensor([1, 1, 1, 0, 1], dtype=torch.bool)[:, None]
    )
    v, _, a = activated.dense(without)
    silent_v, _, silent_a = activated.dense(silent)
    assert_close(silent_v, v)
    assert_close(silent_a, a)


def test_a_child_counts_as_much_as_two_alike_of_half_its_activation(activated):
    x = draw("sparse")
    twice = [0, 1, 2, 3, 4, 4]
    halved = x.a[:, twice].clone()
    halved[:, 4:] /= 2
    parted = x._replace(
        mask=x.mask[twice], u_hat=x.u_hat[:, twice], logits=x.logits[:, twice], a=halved
    )
    v, _, a = activated.dense(x)
    parted_v, _, parted_a = activated.dense(parted)
    assert_close(parted_v, v)
    assert_close(parted_a, a)


def test_the_activation_of_a_child_matters(activated):
    x = draw("sparse")
    louder = x.a.clone()
    louder[:, 0] += 0.5
    v, _, a = activated.dense(x)
    louder_v, _, louder_a = activated.dense(x._replace(a=louder))
    assert ((louder_v - v).abs().amax(dim=(1, 2)) > 1e-3).all()
    assert ((louder_a - a).abs().amax(dim=1) > 1e-8).all()


def test_one_child_and_one_parent_give_the_squashed_vote():
    v, c = reference.dynamic_routing(torch.tensor([[[[0.0, 3.0]]]]), 3)
    assert c.item() == 1
    assert_close(v, torch.tensor([[[0.0, 0.9]]]))  # 9/10 of a unit vector


def test_self_attention_of_one_vote_squashes_it_exponentially():
    v, c = reference.self_attention_routing(torch.tensor([[[[0.0, 3.0]]]]))
    assert c.item() == 1
    assert_close(v, torch.tensor([[[0.0, 1 - math.exp(-3)]]]))


def test_attention_normalises_one_vote():
    v, _ = reference.inverted_attention_routing(torch.tensor([[[[1.0, 5.0]]]]), 2, eps=0)
    assert_close(v, torch.tensor([[[-1.0, 1.0]]]))


def test_self_routing_shares_a_child_by_its_logits():
    u_hat = torch.randn(1, 1, 2, 3)
    logits = torch.tensor([[[math.log(3), 0.0]]])
    v, c, a = reference.self_routing(u_hat, torch.tensor([[0.5]]), logits)
    assert_close(c[0, 0], torch.tensor([0.75, 0.25]))
    assert_close(a[0], torch.tensor([0.75, 0.25]))
    assert_close(v[0], u_hat[0, 0])


def test_em_fits_a_gaussian_and_weighs_its_cost():
    # votes 1 and −1: μ = 0, σ = 1, so the cost is 2 (β_u + ln 1), and λ is 20 (1 − 0.95) = 1
    v, _, a = reference.em_routing(
        torch.tensor([[[[1.0]], [[-1.0]]]]),
        torch.ones(1, 2),
        beta_a=torch.tensor([2 + math.log(3)]),
        beta_u=torch.ones(1),
        iterations=1,
        final_inverse_temperature=20,
        min_variance=0,
    )
    assert v.item() == 0
    assert_close(a, torch.tensor([[0.75]]))  # logistic(ln 3)


def test_the_authors_em_keeps_a_tenth_of_the_mean_before():
    # one parent: the mean of the votes is 2 in every iteration, μ is 1.8 and then 1.8 + 0.18
    def mean_after(iterations):
        return reference.em_routing(
            torch.tensor([[[[1.0]], [[3.0]]]], dtype=torch.float64),
            torch.ones(1, 2, dtype=torch.float64),
            torch.zeros(1, dtype=torch.float64),
            torch.zeros(1, dtype=torch.float64),
            iterations,
            variant="authors",
        ).v.item()

    assert mean_after(1) == pytest.approx(1.8, abs=1e-6)
    assert mean_after(2) == pytest.approx(1.98, abs=1e-6)


def test_variational_bayes_without_an_active_child_gives_its_prior():
    # α = 1 for two parents: E ln π = ψ(1) − ψ(2) = −1; D = 1, ν = 2: E ln Λ = ln 2 − γ
    m, _, a = reference.variational_bayes_routing(
        torch.randn(1, 3, 2, 1, dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        m0=0.25,
    )
    entropy = (math.log(math.pi) + 1 + 0.5772156649015329) / 2
    assert m.eq(0.25).all()
    expected = 1 / (1 + math.exp(math.exp(-1) * entropy))
    assert_close(a, torch.full((1, 2), expected, dtype=torch.float64))


def test_votes_are_the_matrices_applied_to_the_poses():
    u, weight = torch.randn(2, 3, 4), torch.randn(3, 5, 4, 6)
    u_hat = reference.votes(u, weight)
    assert_close(u_hat[1, 2, 3], weight[2, 3].T @ u[1, 2])


VOTES, ONES, BETA = torch.zeros(1, 3, 2, 4), torch.ones(1, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reference.dynamic_routing(VOTES, 0), "at least 1; got 0"),
        (lambda: reference.inverted_attention_routing(VOTES, 0), "at least 1; got 0"),
        (lambda: reference.em_routing(VOTES, ONES, BETA, BETA, 0), "at least 1; got 0"),
        (
            lambda: reference.variational_bayes_routing(VOTES, ONES, BETA, BETA, 0),
            "at least 1; got 0",
        ),
        (lambda: reference.dynamic_routing(VOTES[0]), r"votes \[B, I, J, D\]; got \[3, 2, 4\]"),
        (lambda: reference.dynamic_routing(VOTES, gradients="none"), "choose all or last"),
        (lambda: reference.dynamic_routing(VOTES, temperature=0), "above 0; got 0"),
        (
            lambda: reference.dynamic_routing(VOTES, bias=torch.zeros(4)),
            r"bias \[J, D\] = \[2, 4\]; got \[4\]",
        ),
        (
            lambda: reference.uniform_routing(VOTES, mask=torch.ones(2, 3) > 0),
            r"mask \[I, J\] = \[3, 2\]; got \[2, 3\]",
        ),
        (lambda: reference.uniform_routing(VOTES, mask=torch.ones(3, 2)), "use mask != 0"),
        (
            lambda: reference.inverted_attention_routing(VOTES, norm_bias=torch.zeros(2, 4)),
            r"norm_bias \[D\] = \[4\]; got \[2, 4\]",
        ),
        (
            lambda: reference.self_attention_routing(VOTES, torch.zeros(2)),
            r"beta \[I, J\] = \[3, 2\]; got \[2\]",
        ),
        (
            lambda: reference.self_routing(VOTES, ONES[0], torch.zeros(1, 3, 2)),
            r"a \[B, I\] = \[1, 3\]; got \[3\]",
        ),
        (
            lambda: reference.self_routing(VOTES, ONES, torch.zeros(3, 2)),
            r"logits \[B, I, J\] = \[1, 3, 2\]; got \[3, 2\]",
        ),
        (
            lambda: reference.em_routing(VOTES, ONES, torch.zeros(1), BETA),
            r"beta_a \[J\] = \[2\]; got \[1\]",
        ),
        (
            lambda: reference.em_routing(VOTES, ONES, BETA, BETA, variant="code"),
            "choose paper or authors",
        ),
        (
            lambda: reference.variational_bayes_routing(VOTES, ONES, BETA, torch.zeros(1)),
            r"beta_u \[J\] = \[2\]; got \[1\]",
        ),
        (
            lambda: reference.variational_bayes_routing(VOTES, ONES, BETA, BETA, nu0=3),
            "above D − 1 = 3; got 3",
        ),
        (
            lambda: reference.variational_bayes_routing(VOTES, ONES, BETA, BETA, kappa0=0),
            "must be above 0; got 1.0 and 0",
        ),
    ],
)
def test_what_cannot_be_routed_is_refused_with_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
