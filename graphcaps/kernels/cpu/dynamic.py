"""The operations `graphcaps::dynamic_routing` and its backward on the CPU.

The passes take and return numpy arrays. The steps between them use numpy for few numbers, which is
faster, and torch for many.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphcaps.kernels.cpu.lay_out import make_parts
from graphcaps.kernels.cpu.parts import Array, Needed, Totals, array

LARGE = 1 << 15  # numbers


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
        v `[B, J, D]`; s of all iterations, `[R, B, J, D]`; and an empty tensor.
    """
    V, s = None, []
    parts = make_parts(u, weight, edges, parents, rows=1)
    for _ in range(iterations):
        inputs = parts.inputs(p=V)
        _, sums, _ = parts.couple_pass(inputs, False, (False, True, False))
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
    """`q^r = (∂squash/∂s)ᵀ (∂v^r + H_r)`, `H_{r-1} = H_r + Σ l^r_e û_e`, from the last r down."""
    sums = array(s)
    last = len(sums) - 1
    none = Needed(*[False] * 8)
    parts = make_parts(u, weight, edges, parents, rows=1)
    V = [parts.in_lanes(V) for V in itertools.accumulate(map(_squash, sums[:last]))]
    q = [parts.in_lanes(_squash_gradient(sums[last], array(dv)))]
    H = np.zeros_like(sums[last])
    for r in range(last, 0, -1) if through_all else ():
        inputs = parts.inputs()._replace(p=V[r - 1])
        of_sums = Totals(parts.empty(0), q[0], parts.empty(0))
        dp = parts.couple_gradient_pass(inputs, False, False, of_sums, none._replace(p=True))[4]
        H = H + dp
        q.insert(0, parts.in_lanes(_squash_gradient(sums[r - 1], H)))
    du, dweight = parts.dynamic_gradient_pass(V, q, last + 1, needed)
    return (
        torch.from_numpy(du.reshape(u.shape if needed[0] else 0)),
        torch.from_numpy(dweight.reshape(weight.shape if needed[1] else 0)),
    )


@np.errstate(over="ignore", invalid="ignore")
def _squash(s: Array) -> Array:
    """`s |s| / (1 + |s|²)`."""
    x = _shared_if_large(s)
    square = (x * x).sum(axis=-1, keepdims=True)
    return np.asarray(x * (square**0.5 / (1 + square)))


@np.errstate(over="ignore", invalid="ignore")
def _squash_gradient(s: Array, dv: Array) -> Array:
    """`(∂squash/∂s)ᵀ ∂v`; 0 where s is 0."""
    x, of_v = _shared_if_large(s), _shared_if_large(dv)
    square = (x * x).sum(axis=-1, keepdims=True)
    norm = square**0.5
    unit = x / (norm + (norm == 0))
    along = (unit * of_v).sum(axis=-1, keepdims=True)
    scale = norm / (1 + square)
    return np.asarray(scale * (of_v + (1 - square) / (1 + square) * along * unit))


def _shared_if_large(x: Array) -> Any:
    """A tensor, on which torch computes with all threads, if this is faster than numpy."""
    return torch.from_numpy(x) if x.size > LARGE else x
