"""The operations `graphcaps::couple` and `graphcaps::couple_backward` on CUDA."""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphcaps.kernels.triton import device
from graphcaps.kernels.triton.arguments import Inputs, Orders, Pass, Quadratic, Softmax, sizes
from graphcaps.kernels.triton.children import means, softmax
from graphcaps.kernels.triton.gradients import gradient_of_poses, gradients_of_kinds
from graphcaps.kernels.triton.parents import add_parts, partial_sums


def couple(
    u: Tensor,
    weight: Tensor,
    a: Tensor | None,
    r: Tensor | None,
    k: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    beta: Tensor | None,
    prior: Tensor | None,
    edges: Sequence[Tensor],
    parents: int,
    rows: int,
    leak: bool,
    squares: bool,
    detach_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """N, S and Q in float32, and the softmax's state for the backward.

    The formulas are in kernels/README.md. Features of parents and children may be in float32 or
    bfloat16, independently of the dtype of `u`; without `squares`, Q has size 0.

    Returns:
        N `[B, J]`, S and Q `[B, J, P·D]`; each child's largest logit and the denominator of its
        softmax, `[2, B, I]`, or of size 0 if all logits are equal.

    Raises:
        RuntimeError: the kernels cannot run on this device.
        ValueError: poses or batch are too large for the kernels.
    """
    run, orders = _prepare(
        u, weight, a, r, k, p, q, beta, prior, edges=edges, parents=parents, rows=rows, leak=leak
    )
    kept = u.new_empty(0)
    if _has_logits(run):
        kept = u.new_empty((2, len(u), u.shape[1]), dtype=torch.float32)
        run = run._replace(softmax=Softmax(kept[0], kept[1]))
        softmax(run, orders, leak)
    partial = partial_sums(run, orders, (True, True, squares))
    N, S, Q = (u.new_empty(0) if x is None else add_parts(x) for x in partial)
    return N, S, Q, kept


def couple_backward(
    dN: Tensor,
    dS: Tensor,
    dQ: Tensor,
    kept: Tensor,
    u: Tensor,
    weight: Tensor,
    a: Tensor | None,
    r: Tensor | None,
    k: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    beta: Tensor | None,
    prior: Tensor | None,
    edges: Sequence[Tensor],
    parents: int,
    rows: int,
    leak: bool,
    squares: bool,
    detach_coupling: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, weight, a, k, p, q, beta and prior, of size 0 where not `needed`.

    The gradients of k and p may be needed even if k and p are absent, because the gradient of r is
    computed from them. Those of u, weight and a have the dtypes of u, weight and a; all others are
    float32.
    """
    run, orders = _prepare(
        u, weight, a, r, k, p, q, beta, prior, edges=edges, parents=parents, rows=rows, leak=leak
    )
    of_u, of_weight, of_a, *of_parents, of_beta, of_prior = needed
    dQ_or_none = dQ.contiguous() if squares else None
    run = run._replace(gradients=Quadratic(dN.contiguous(), dS.contiguous(), dQ_or_none))
    of_logits = _has_logits(run) and not detach_coupling
    if _has_logits(run):
        mean = torch.empty_like(kept[0]) if of_logits else None
        run = run._replace(softmax=Softmax(kept[0], kept[1], mean))
    da = a.new_empty(a.shape) if of_a and a is not None else None
    if of_logits or da is not None:
        means(run, orders, da)
    sums = Quadratic()
    if of_logits and any(of_parents):
        sums = partial_sums(run, orders, of_parents)
    of_kinds = (of_weight, of_beta, of_prior and of_logits)
    dweight, dbeta, dprior = gradients_of_kinds(run, orders, of_kinds)
    du = gradient_of_poses(run, orders) if of_u else None
    dk, dp, dq = (x if x is None else add_parts(x) for x in sums)
    gradients = (du, dweight, da, dk, dp, dq, dbeta, dprior)
    return tuple(  # type: ignore[return-value]
        u.new_empty(0) if x is None else x for x in gradients
    )


def _prepare(
    u: Tensor,
    weight: Tensor,
    *features: Tensor | None,
    edges: Sequence[Tensor],
    parents: int,
    rows: int,
    leak: bool,
) -> tuple[Pass, Orders]:
    """A pass with all of its inputs, and with the softmax of equal logits for the time being."""
    device.check(u.device)
    u, weight = u.contiguous(), weight.contiguous()
    a, r, k, p, q, beta, prior = (x if x is None else x.contiguous() for x in features)
    (batch, children, _), (_, K, D) = u.shape, weight.shape
    *sorted_edges, degree = edges
    run = Pass(
        Inputs(u, weight, a, r, beta, prior, batch, children, parents),
        logits=Quadratic(k, p, q),
        softmax=Softmax(None, degree + 1 if leak else degree),
        gradients=Quadratic(),
        size=sizes(batch, K, D, rows),
    )
    return run, Orders.of(sorted_edges)


def _has_logits(run: Pass) -> bool:
    return any(x is not None for x in (*run.logits, run.inputs.prior))
