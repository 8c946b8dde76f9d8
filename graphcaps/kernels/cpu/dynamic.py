"""The operations `graphcaps::dynamic_routing` and its backward on the CPU.

All of it in numpy: torch's own threads keep a core busy for a while after they have worked, and
the next pass would have to share it.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graphcaps.kernels.cpu.couple import (
    Needed,
    couple_gradient_pass,
    couple_pass,
    make_gradient_scratch,
    make_inputs,
)
from graphcaps.kernels.cpu.parts import Array, Parts, Totals, array


def dynamic_routing(
    u: Tensor,
    weight: Tensor,
    edges: Sequence[Tensor],
    parents: int,
    complete: bool,
    iterations: int,
    through_all: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`s^r_j = Σ c^r_e û_e` with `c^r = softmax(û · V_{r-1})`, and `V_r = V_{r-1} + v^r`.

    Returns:
        v `[B, J, D]`; s of all iterations, `[R, B, J, D]`; and nothing of the children.
    """
    V, s = None, []
    with Parts(u, weight, edges, parents, rows=1) as parts:
        for _ in range(iterations):
            inputs = make_inputs(parts, p=V)
            _, sums, _ = couple_pass(parts, inputs, False, (False, True, False))
            v = _squash(sums)
            V = v if V is None else V + v
            s.append(sums)
    return torch.from_numpy(v), torch.from_numpy(np.stack(s)), u.new_empty(0)


def dynamic_routing_backward(
    dv: Tensor,
    s: Tensor,
    of_children: Tensor,
    u: Tensor,
    weight: Tensor,
    edges: Sequence[Tensor],
    parents: int,
    complete: bool,
    through_all: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """`q^r = (∂squash/∂s)ᵀ (∂v^r + H_r)` and `H_{r-1} = H_r + Σ l^r_e û_e`, from the last r."""
    sums = array(s)
    last = len(sums) - 1
    none = Needed(*[False] * 8)
    with Parts(u, weight, edges, parents, rows=1) as parts:
        V = [parts.in_lanes(V) for V in itertools.accumulate(map(_squash, sums[:last]))]
        q = [parts.in_lanes(_squash_gradient(sums[last], array(dv)))]
        H = np.zeros_like(sums[last])
        for r in range(last, 0, -1) if through_all else ():
            inputs = make_inputs(parts)._replace(p=V[r - 1])
            of_sums = Totals(parts.empty(0), q[0], parts.empty(0))
            dp = couple_gradient_pass(parts, inputs, False, of_sums, none._replace(p=True))[4]
            H = H + dp
            q.insert(0, parts.in_lanes(_squash_gradient(sums[r - 1], H)))
        du, dweight = _last_pass(parts, V, q, last + 1, needed)
    return (
        torch.from_numpy(du.reshape(u.shape if needed[0] else 0)),
        torch.from_numpy(dweight.reshape(weight.shape if needed[1] else 0)),
    )


def _last_pass(
    parts: Parts,
    V: Sequence[Array],
    q: Sequence[Array],
    iterations: int,
    needed: Sequence[bool],
) -> tuple[Array, Array]:
    """The gradients of u and weight; empty where not needed."""
    from graphcaps.kernels.cpu.dynamic_passes import dynamic_gradient_pass

    of_u, of_weight = needed
    children, dweights = parts.private_matrices(of_weight)
    du = parts.empty(parts.u.size * of_u)
    of_all_V = np.concatenate([parts.empty(0), *V])
    of_all_q = np.concatenate(q)
    calls = [
        (
            parts.u.reshape(-1),
            parts.weight.reshape(-1),
            parts.edges,
            those,
            parts.sizes,
            of_all_V,
            of_all_q,
            iterations,
            parts.lanes_as_type,
            make_gradient_scratch(parts, edges_at_once=parts.most),
            parts.zero_matrix_sums(of_weight),
            du,
            dweight,
        )
        for those, dweight in zip(children, dweights, strict=True)
    ]
    parts.run(dynamic_gradient_pass, calls)
    return du, parts.add_matrices(dweights)


@np.errstate(over="ignore", invalid="ignore")
def _squash(s: Array) -> Array:
    """`s |s| / (1 + |s|²)`."""
    square = np.square(s).sum(axis=-1, keepdims=True)
    return s * (np.sqrt(square) / (1 + square))


@np.errstate(over="ignore", invalid="ignore")
def _squash_gradient(s: Array, dv: Array) -> Array:
    """`(∂squash/∂s)ᵀ ∂v`; 0 where s is."""
    square = np.square(s).sum(axis=-1, keepdims=True)
    norm = np.sqrt(square)
    unit = s / np.where(norm > 0, norm, 1)
    along = (unit * dv).sum(axis=-1, keepdims=True)
    scale = norm / (1 + square)
    return scale * (dv + (1 - square) / (1 + square) * along * unit)
