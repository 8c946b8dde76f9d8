"""Dynamic routing on CUDA; the last backward pass handles all iterations at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphcaps.kernels.triton import device, tiles
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
from graphcaps.kernels.triton.gradients import gradient_of_poses, gradients_of_kinds
from graphcaps.kernels.triton.parents import partial_sums
from graphcaps.kernels.triton.squash import differentiate_squash, squash_sums


def dynamic_routing(
    u: Tensor,
    weight: Tensor,
    edges: Sequence[Tensor],
    parents: int,
    complete: bool,
    iterations: int,
    through_all: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`s^r = Σ c^r û` with `c^r = softmax(û · V_{r-1})`, `V_r = V_{r-1} + squash(s^r)`.

    Sums are taken in float32 and in a fixed order: equal calls give bitwise equal results.

    Returns:
        v `[B, J, D]`; s and V of all iterations, `[2·R, B, J, D]`, where V is the sum of the v of
        the iterations before; and each child's largest logit and the denominator of its softmax in
        all iterations, `[2·R, B, I]`.

    Raises:
        RuntimeError: the kernels cannot run on this device.
        ValueError: poses or batch are too large for the kernels.
    """
    u, weight = u.contiguous(), weight.contiguous()
    run, orders, size_of_tiles = _prepare(u, weight, edges, parents, complete)
    of_parents = u.new_zeros(
        (2 * iterations, len(u), parents, weight.shape[2]), dtype=torch.float32
    )
    of_children = u.new_zeros((2 * iterations, *u.shape[:2]), dtype=torch.float32)
    (s, V), (most, total) = of_parents.chunk(2), of_children.chunk(2)
    total[:] = edges[-1]  # the degrees, for the equal logits of the first iteration
    v = u.new_empty(of_parents.shape[1:])
    for r in range(iterations):
        if r > 0:
            run = run._replace(logits=Quadratic(linear=V[r]), softmax=Softmax(most[r], total[r]))
        if r > 0 and size_of_tiles is None:
            softmax(run, orders)
        partial = _partial_sums(run, orders, size_of_tiles)
        last = r == iterations - 1
        squash_sums(partial, s[r], V[r], None if last else V[r + 1], v)
    return v, of_parents, of_children


def dynamic_routing_backward(
    dv: Tensor,
    of_parents: Tensor,
    of_children: Tensor,
    u: Tensor,
    weight: Tensor,
    edges: Sequence[Tensor],
    parents: int,
    complete: bool,
    through_all: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """`∂V_{r-1} = ∂V_r + Σ λ^r û` from the last r down, then ∂û of all iterations at once.

    Returns:
        The gradients of u and weight, of size 0 where not `needed`.
    """
    u, weight = u.contiguous(), weight.contiguous()
    run, orders, size_of_tiles = _prepare(u, weight, edges, parents, complete)
    (s, V), (most, total) = of_parents.chunk(2), of_children.chunk(2)
    through_all = through_all and len(s) > 1
    first = 0 if through_all else len(s) - 1
    ds, dV = torch.empty_like(s), torch.zeros_like(s[0])
    differentiate_squash(dv.contiguous(), None, s[-1], ds[-1], None)
    mean = None
    if through_all:
        mean = torch.zeros_like(most)  # that of the first iteration is not used, as V_0 = 0
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
    du = gradient_of_poses(run, orders) if needed[0] else u.new_empty(0)
    dweight = None
    if needed[1]:
        dweight, _, _ = gradients_of_kinds(run, orders, (True, False, False))
    return du, u.new_empty(0) if dweight is None else dweight


def _partial_sums(run: Pass, orders: Orders, size_of_tiles: Sizes | None) -> Tensor:
    """Partial sums of c û, or of λ û in the backward, `[parts, B, J, D]`."""
    if size_of_tiles is not None:
        return tiles.partial_sums(run._replace(size=size_of_tiles))
    return partial_sums(run, orders, (False, True, False)).linear


def _prepare(
    u: Tensor, weight: Tensor, edges: Sequence[Tensor], parents: int, complete: bool
) -> tuple[Pass, Orders, Sizes | None]:
    """A pass with equal coupling, and the sizes of tiles if tiles are used."""
    device.check(u.device)
    (batch, children, _), (_, K, D) = u.shape, weight.shape
    size = sizes(batch, K, D)
    *sorted_edges, degree = edges
    run = Pass(
        Inputs(u, weight, None, None, None, None, batch, children, parents),
        logits=Quadratic(),
        softmax=Softmax(None, degree),
        gradients=Quadratic(),
        size=size,
    )
    of_tiles = tiles.sizes_of_tiles(parents, size) if complete else None
    return run, Orders.of(sorted_edges), of_tiles
