"""Dynamic routing on CUDA, with the last pass shared by all iterations."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from graphcaps.kernels.triton import device, parents, tiles
from graphcaps.kernels.triton.arguments import (
    Inputs,
    Orders,
    Pass,
    Quadratic,
    Sizes,
    Softmax,
    sizes,
)
from graphcaps.kernels.triton.children import means, softmax
from graphcaps.kernels.triton.device import tl
from graphcaps.kernels.triton.edges import TritonEdges
from graphcaps.kernels.triton.gradients import gradient_of_poses, gradients_of_kinds
from graphcaps.kernels.triton.squash import differentiate_squash, squash_sums


def routed(
    u: Tensor,
    weight: Tensor,
    edges: TritonEdges,
    iterations: int = 3,
    gradients: Literal["all", "last"] = "all",
) -> Tensor:
    """What `kernels.routed` does after it has looked at the arguments.

    Sums are in float32 and in a fixed order: equal calls give equal bits.

    Raises:
        RuntimeError: the kernels cannot run on this device.
        ValueError: poses or batch are larger than the kernels take.
    """
    device.check(u.device)
    return _Routed.apply(u, weight, edges, iterations, gradients == "all")


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, edges: TritonEdges, iterations: int, through_all: bool
    ) -> Tensor:
        u, weight = u.contiguous(), weight.contiguous()
        v, kept = _forward(u, weight, edges, iterations)
        ctx.save_for_backward(u, weight, *kept)
        ctx.edges, ctx.through_all = edges, through_all and iterations > 1
        return v

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "engine 'fused' has first derivatives alone; use engine='scatter' for the second"
            )
        u, weight, *kept = ctx.saved_tensors
        du, dweight = _backward(
            dv.contiguous(),
            _Kept(*kept),
            u,
            weight,
            ctx.edges,
            ctx.through_all,
            ctx.needs_input_grad,
        )
        return du, dweight, None, None, None


class _Kept(NamedTuple):
    """What the backward needs of every iteration."""

    s: Tensor  # [R, B, J, D]
    V: Tensor  # [R, B, J, D], the sum of the v of the iterations before
    most: Tensor  # [R, B, I], of each child's softmax
    total: Tensor  # [R, B, I]


def _forward(
    u: Tensor, weight: Tensor, edges: TritonEdges, iterations: int
) -> tuple[Tensor, _Kept]:
    """`s^r = Σ c^r û` with `c^r = softmax(û · V_{r-1})`, `V_r = V_{r-1} + squash(s^r)`."""
    run, orders, size_of_tiles = _prepare(u, weight, edges)
    numbers = (iterations, len(u), edges.parents, weight.shape[2])
    s = u.new_empty(numbers, dtype=torch.float32)
    V = u.new_zeros(numbers, dtype=torch.float32)
    most = u.new_zeros((iterations, *u.shape[:2]), dtype=torch.float32)
    total = edges.degree.expand(most.shape).contiguous()  # of the first iteration's equal logits
    v = u.new_empty(numbers[1:])
    for r in range(iterations):
        if r > 0:
            run = run._replace(logits=Quadratic(linear=V[r]), softmax=Softmax(most[r], total[r]))
        if r > 0 and size_of_tiles is None:
            softmax(run, orders)
        partial = _partial_sums(run, orders, size_of_tiles)
        last = r == iterations - 1
        squash_sums(partial, s[r], V[r], None if last else V[r + 1], v)
    return v, _Kept(s, V, most, total)


def _backward(
    dv: Tensor,
    kept: _Kept,
    u: Tensor,
    weight: Tensor,
    edges: TritonEdges,
    through_all: bool,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """From the last iteration `∂V_{r-1} = ∂V_r + Σ λ^r û`, then ∂û of all iterations at once."""
    run, orders, size_of_tiles = _prepare(u, weight, edges)
    s, V, most, total = kept
    first = 0 if through_all else len(s) - 1
    ds, dV = torch.empty_like(s), torch.zeros_like(s[0])
    differentiate_squash(dv, None, s[-1], ds[-1], None)
    mean = None
    if through_all:
        mean = torch.zeros_like(most)  # the first iteration's is not used, as V_0 = 0
        for r in reversed(range(1, len(s))):
            run = run._replace(
                logits=Quadratic(linear=V[r]),
                softmax=Softmax(most[r], total[r], mean[r]),
                gradients=Quadratic(linear=ds[r]),
            )
            if size_of_tiles is None:
                means(run, orders)
            partial = _partial_sums(run, orders, size_of_tiles)
            differentiate_squash(dV, partial, s[r - 1], ds[r - 1], dV)
    run = run._replace(
        logits=Quadratic(linear=V[first:]),
        softmax=Softmax(most[first:], total[first:], mean),
        gradients=Quadratic(linear=ds[first:]),
        size=run.size._replace(R=tl.constexpr(len(s) - first)),
    )
    du = gradient_of_poses(run, orders) if needed[0] else None
    dweight = gradients_of_kinds(run, orders, (True, False, False))[0] if needed[1] else None
    return du, dweight


def _partial_sums(run: Pass, orders: Orders, size_of_tiles: Sizes | None) -> Tensor:
    """Σ c û, or in the backward Σ λ û, `[parts, B, J, D]`."""
    if size_of_tiles is not None:
        return tiles.partial_sums(run._replace(size=size_of_tiles))
    return parents.partial_sums(run, orders, (False, True, False)).linear


def _prepare(u: Tensor, weight: Tensor, edges: TritonEdges) -> tuple[Pass, Orders, Sizes | None]:
    """A pass over votes that couple equally, and the sizes of tiles where these are taken."""
    (batch, children, _), (_, K, D) = u.shape, weight.shape
    size = sizes(batch, K, D)
    run = Pass(
        Inputs(u, weight, None, None, None, None, batch, children, edges.parents),
        logits=Quadratic(),
        softmax=Softmax(None, edges.degree),
        gradients=Quadratic(),
        size=size,
    )
    orders = Orders(edges.by_child, edges.by_parent, edges.by_kind)
    return run, orders, tiles.sizes_of_tiles(edges, size)
