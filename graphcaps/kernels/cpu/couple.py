"""The operations `graphcaps::couple` and `graphcaps::couple_backward` on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphcaps.kernels.cpu.lay_out import make_parts
from graphcaps.kernels.cpu.parts import Needed, Totals, array, optional_array


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
    """N, S, Q, and an empty tensor: the backward needs none, as it recomputes the coupling."""
    parts = make_parts(u, weight, edges, parents, rows)
    inputs = parts.inputs(*map(optional_array, (a, r, k, p, q, beta, prior)))
    found = parts.couple_pass(inputs, leak, (True, True, squares))
    N, S, Q = map(torch.from_numpy, found)
    return N.squeeze(-1), S, Q, u.new_empty(0)


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
    """The gradients of u, weight, a, k, p, q, beta and prior that are needed."""
    parts = make_parts(u, weight, edges, parents, rows)
    inputs = parts.inputs(*map(optional_array, (a, r, k, p, q, beta, prior)))
    of_sums = Totals(
        N=parts.in_lanes(array(dN)),
        S=parts.in_lanes(array(dS)),
        Q=parts.in_lanes(array(dQ)) if squares else parts.empty(0),
    )
    found = parts.couple_gradient_pass(inputs, leak, detach_coupling, of_sums, Needed(*needed))
    kinds = weight.shape[:1]
    shapes = (u.shape, weight.shape, u.shape[:2], dN.shape, dS.shape, dS.shape, kinds, kinds)
    du, dweight, da, dk, dp, dq, dbeta, dprior = (
        torch.from_numpy(x.reshape(shape if wanted else 0))
        for x, shape, wanted in zip(found, shapes, needed, strict=True)
    )
    return du, dweight, da, dk, dp, dq, dbeta, dprior
