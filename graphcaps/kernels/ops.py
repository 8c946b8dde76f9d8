"""The kernels as operations of torch, for every device: with fakes, autograd and no side effects.

`torch.compile`, FakeTensor, the meta device and `torch.func` see an operation and its shapes; what
computes it is chosen by the device of its tensors.
"""

from typing import Any, Sequence  # noqa: UP035, custom_op of older torch knows no other

import torch
from torch import Tensor

from graphcaps.kernels.cpu import couple as couple_cpu
from graphcaps.kernels.cpu import dynamic as dynamic_cpu


@torch.library.custom_op("graphcaps::couple", mutates_args=(), device_types="cpu")
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over the edges: N, S, Q (of size 0 without `squares`), and what the backward keeps.

    What is `kept`, and what `edges` has to be, is the device's own affair; the rest is told at
    `Votes`.
    """
    return couple_cpu.couple(
        u, weight, a, r, k, p, q, beta, prior, edges, parents, rows, leak, squares
    )


@couple.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from graphcaps.kernels.triton import couple as couple_cuda

    return couple_cuda.couple(*args)


@couple.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _dtype_of_sums(u)
    N = u.new_empty(u.shape[0], parents, dtype=dtype)
    S = u.new_empty(u.shape[0], parents, rows * weight.shape[2], dtype=dtype)
    Q = torch.empty_like(S) if squares else u.new_empty(0)
    kept = u.new_empty(0)
    if u.device.type == "cuda" and any(x is not None for x in (k, p, q, prior)):
        kept = u.new_empty(2, *u.shape[:2], dtype=dtype)
    return N, S, Q, kept


def _dtype_of_sums(u: Tensor) -> torch.dtype:
    return torch.promote_types(u.dtype, torch.float32)


@torch.library.custom_op("graphcaps::couple_backward", mutates_args=(), device_types="cpu")
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
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, weight, a, k, p, q, beta and prior, of size 0 where not `needed`.

    `needed` has eight entries. Those of k and p may be needed without there being a k or p: the
    gradient of r is made of them.
    """
    return couple_cpu.couple_backward(
        dN,
        dS,
        dQ,
        kept,
        u,
        weight,
        a,
        r,
        k,
        p,
        q,
        beta,
        prior,
        edges,
        parents,
        rows,
        leak,
        squares,
        needed,
    )


@couple_backward.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, ...]:
    from graphcaps.kernels.triton import couple as couple_cuda

    return couple_cuda.couple_backward(*args)


@couple_backward.register_fake
def _(dN: Tensor, dS: Tensor, dQ: Tensor, kept: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    u, weight, a, *_, needed = inputs
    dtype, kinds = _dtype_of_sums(u), weight.shape[:1]
    shapes = (u.shape, weight.shape, u.shape[:2], dN.shape, dS.shape, dS.shape, kinds, kinds)
    dtypes = (u.dtype, weight.dtype, u.dtype if a is None else a.dtype, *[dtype] * 5)
    return tuple(
        u.new_empty(shape, dtype=dtype) if wanted else u.new_empty(0)
        for shape, dtype, wanted in zip(shapes, dtypes, needed, strict=True)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *features, edges, parents, rows, leak, squares = inputs
    N, S, _, kept = output
    ctx.save_for_backward(N, S, kept, *features, *edges)
    ctx.sizes = parents, rows, leak, squares


def _backward(ctx: Any, dN: Tensor, dS: Tensor, dQ: Tensor, _: Tensor) -> tuple[Any, ...]:
    N, S, kept, *saved = ctx.saved_tensors
    features, edges = saved[:9], saved[9:]
    squares = ctx.sizes[-1]
    *_, p, q, _, _ = features
    of_u, of_weight, of_a, of_r, of_k, of_p, of_q, of_beta, of_prior = ctx.needs_input_grad[:9]
    of_k = of_k or (of_r and p is not None)  # the gradient of r is made of these
    of_p = of_p or (of_r and q is not None)
    needed = [of_u, of_weight, of_a, of_k, of_p, of_q, of_beta, of_prior]
    found = torch.ops.graphcaps.couple_backward(
        dN, dS, dQ, kept, *features, edges, *ctx.sizes, needed
    )
    du, dweight, da, dk, dp, dq, dbeta, dprior = found
    dr = None
    if of_r:
        dr = -N.unsqueeze(-1) * dS
        dr = dr - 2 * dQ * S if squares else dr
        dr = dr - p * dk.unsqueeze(-1) if p is not None else dr
        dr = dr - 2 * q * dp if q is not None else dr
    gradients = (du, dweight, da, dr, dk, dp, dq, dbeta, dprior)
    return (
        *(x if n else None for x, n in zip(gradients, ctx.needs_input_grad, strict=False)),
        [None] * len(edges),
        *[None] * 4,
    )


couple.register_autograd(_backward, setup_context=_keep)


def _refuse_second(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "engine 'fused' has first derivatives alone; use engine='scatter' for the second"
    )


couple_backward.register_autograd(_refuse_second)


@torch.library.custom_op("graphcaps::dynamic_routing", mutates_args=(), device_types="cpu")
def dynamic_routing(
    u: Tensor,
    weight: Tensor,
    edges: Sequence[Tensor],
    parents: int,
    iterations: int,
    through_all: bool,
) -> tuple[Tensor, Tensor]:
    """Dynamic routing: v `[B, J, D]`, and what the backward keeps, s of all iterations."""
    return dynamic_cpu.dynamic_routing(u, weight, edges, parents, iterations)


@dynamic_routing.register_fake
def _(
    u: Tensor,
    weight: Tensor,
    edges: Sequence[Tensor],
    parents: int,
    iterations: int,
    through_all: bool,
) -> tuple[Tensor, Tensor]:
    v = u.new_empty(u.shape[0], parents, weight.shape[2])
    return v, v.new_empty(iterations, *v.shape)


@torch.library.custom_op("graphcaps::dynamic_routing_backward", mutates_args=(), device_types="cpu")
def dynamic_routing_backward(
    dv: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    edges: Sequence[Tensor],
    parents: int,
    through_all: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of u and weight, of size 0 where not `needed`."""
    return dynamic_cpu.dynamic_routing_backward(
        dv, s, u, weight, edges, parents, through_all, needed
    )


@dynamic_routing_backward.register_fake
def _(
    dv: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    edges: Sequence[Tensor],
    parents: int,
    through_all: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    return (
        u.new_empty(u.shape if needed[0] else 0),
        u.new_empty(weight.shape if needed[1] else 0),
    )


def _keep_dynamic(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    u, weight, edges, parents, _, through_all = inputs
    ctx.save_for_backward(output[1], u, weight, *edges)
    ctx.sizes = parents, through_all


def _dynamic_backward(ctx: Any, dv: Tensor, _: Tensor) -> tuple[Any, ...]:
    s, u, weight, *edges = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:2])
    du, dweight = torch.ops.graphcaps.dynamic_routing_backward(
        dv, s, u, weight, edges, *ctx.sizes, needed
    )
    return (
        du if needed[0] else None,
        dweight if needed[1] else None,
        [None] * len(edges),
        *[None] * 3,
    )


dynamic_routing.register_autograd(_dynamic_backward, setup_context=_keep_dynamic)
dynamic_routing_backward.register_autograd(_refuse_second)
