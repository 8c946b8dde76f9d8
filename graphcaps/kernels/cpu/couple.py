"""The operations `graphcaps::couple` and `graphcaps::couple_backward` on the CPU."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from graphcaps.kernels.cpu.parts import Array, Parts, Totals, array, optional_array


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
    """N, S, Q, and nothing kept: the backward computes the coupling anew."""
    with Parts(u, weight, edges, parents, rows) as parts:
        inputs = make_inputs(parts, *map(optional_array, (a, r, k, p, q, beta, prior)))
        found = couple_pass(parts, inputs, leak, (True, True, squares))
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
    with Parts(u, weight, edges, parents, rows) as parts:
        inputs = make_inputs(parts, *map(optional_array, (a, r, k, p, q, beta, prior)))
        of_sums = Totals(
            N=parts.in_lanes(array(dN)),
            S=parts.in_lanes(array(dS)),
            Q=parts.in_lanes(array(dQ)) if squares else parts.empty(0),
        )
        found = couple_gradient_pass(parts, inputs, leak, of_sums, Needed(*needed), detach_coupling)
    kinds = weight.shape[:1]
    shapes = (u.shape, weight.shape, u.shape[:2], dN.shape, dS.shape, dS.shape, kinds, kinds)
    du, dweight, da, dk, dp, dq, dbeta, dprior = (
        torch.from_numpy(x.reshape(shape if wanted else 0))
        for x, shape, wanted in zip(found, shapes, needed, strict=True)
    )
    return du, dweight, da, dk, dp, dq, dbeta, dprior


class Inputs(NamedTuple):
    """As the passes take them: parents' features in lanes; what is absent is empty."""

    a: Array
    r: Array
    k: Array
    p: Array
    q: Array
    beta: Array
    prior: Array


class Needed(NamedTuple):
    """Something of each input that may need a gradient."""

    u: Any
    weight: Any
    a: Any
    k: Any
    p: Any
    q: Any
    beta: Any
    prior: Any


class Outputs(NamedTuple):
    """Gradients of all but the features of parents; what is not needed is empty."""

    u: Array
    weight: Array
    a: Array
    beta: Array  # float64, as is the next: long sums
    prior: Array


class Scratch(NamedTuple):
    """What a thread works in, flat."""

    x: Array  # the pose of a child
    y: Array  # its votes
    c: Array  # its coupling
    rows: Array  # see steps.py


class GradientScratch(NamedTuple):
    """The same, for gradients."""

    x: Array
    y: Array
    c: Array
    rows: Array
    g: Array  # gradients of coupling or logits
    dx: Array  # of the pose, twice
    dy: Array  # of votes


def make_inputs(
    parts: Parts,
    a: Array | None = None,
    r: Array | None = None,
    k: Array | None = None,
    p: Array | None = None,
    q: Array | None = None,
    beta: Array | None = None,
    prior: Array | None = None,
) -> Inputs:
    """From activations `[B, I]`, parents' features `[B, J, d]` or `[B, J]`, and numbers `[M]`."""
    return Inputs(
        parts.empty(0) if a is None else a.reshape(-1),
        *(parts.empty(0) if x is None else parts.in_lanes(x) for x in (r, k, p, q)),
        *(parts.empty(0) if x is None else x for x in (beta, prior)),
    )


def make_scratch(parts: Parts) -> Scratch:
    """For one thread."""
    return Scratch(
        x=parts.empty(parts.u.shape[2] * parts.lanes),
        y=parts.empty(parts.most * parts.pose * parts.lanes),
        c=parts.empty(parts.most * parts.lanes),
        rows=parts.empty(4 * parts.lanes),
    )


def make_gradient_scratch(parts: Parts, edges_at_once: int) -> GradientScratch:
    """For one thread, which has the gradients of so many votes at once."""
    return GradientScratch(
        *make_scratch(parts),
        g=parts.empty(parts.most * parts.lanes),
        dx=parts.empty(2 * parts.u.shape[2] * parts.lanes),
        dy=parts.empty(edges_at_once * parts.pose * parts.lanes),
    )


def couple_pass(parts: Parts, inputs: Inputs, leak: bool, wanted: Sequence[bool]) -> list[Array]:
    """N `[B, J, 1]`, S and Q `[B, J, P·D]`, those that are wanted; else empty."""
    from graphcaps.kernels.cpu import couple_passes

    totals = [parts.zero_totals(wanted, parts.blocks) for _ in parts.children]
    calls = [
        (
            parts.u.reshape(-1),
            parts.weight.reshape(-1),
            inputs,
            parts.edges,
            children,
            parts.sizes,
            leak,
            parts.lanes_as_type,
            make_scratch(parts),
            parts.zero_sums(wanted),
            own,
        )
        for children, own in zip(parts.children, totals, strict=True)
    ]
    parts.run(couple_passes.couple_pass, calls)
    return parts.add_up(totals, wanted)


def couple_gradient_pass(
    parts: Parts,
    inputs: Inputs,
    leak: bool,
    of_sums: Totals,
    needed: Needed,
    detach_coupling: bool = False,
) -> tuple[Array, ...]:
    """The gradients of all inputs, those that are needed; from those of N, S and Q in lanes."""
    from graphcaps.kernels.cpu import couple_passes

    wanted = needed.k, needed.p or needed.q, needed.q  # Q comes with S
    children, dweights = parts.private_matrices(needed.weight)
    totals = [parts.zero_totals(wanted, parts.blocks) for _ in children]
    samples, nodes = parts.sizes[:2]
    du = parts.empty(parts.u.size * needed.u)
    da = parts.empty(samples * nodes * needed.a)
    of_kinds = [
        (np.zeros(len(parts.weight) * needed.beta), np.zeros(len(parts.weight) * needed.prior))
        for _ in children
    ]
    calls = [
        (
            parts.u.reshape(-1),
            parts.weight.reshape(-1),
            inputs,
            parts.edges,
            children[t],
            parts.sizes,
            leak,
            detach_coupling,
            of_sums,
            parts.lanes_as_type,
            make_gradient_scratch(parts, edges_at_once=1),
            parts.zero_sums(wanted),
            totals[t],
            parts.zero_matrix_sums(needed.weight),
            Outputs(du, dweights[t], da, *of_kinds[t]),
        )
        for t in range(len(children))
    ]
    parts.run(couple_passes.couple_gradient_pass, calls)
    dk, dp, dq = parts.add_up(totals, (needed.k, needed.p, needed.q))
    dbeta, dprior = (sum(x).astype(parts.dtype) for x in zip(*of_kinds, strict=True))
    return du, parts.add_matrices(dweights), da, dk, dp, dq, dbeta, dprior
