"""The kernels as custom operations of torch, with fake implementations and autograd formulas.

`torch.compile`, FakeTensor, the meta device and `torch.func` see an operation and the shapes of its
outputs. Torch dispatches it to a kernel by the device of its tensors.
"""

from typing import Any, Sequence  # noqa: UP035, custom_op of older torch accepts no other

import torch
from torch import Tensor

from graphcaps.kernels.cpu import couple as couple_cpu
from graphcaps.kernels.cpu import dynamic as dynamic_cpu
from graphcaps.kernels.transforms import Samples, transformable


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
    detach_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over the edges: N, S, Q (of size 0 without `squares`), and data for the backward.

    With `detach_coupling`, the backward treats c as a constant. The contents of the last output and
    of `edges` depend on the device. The other arguments are those of `Votes`.
    """
    return couple_cpu.couple(
        u, weight, a, r, k, p, q, beta, prior, edges, parents, rows, leak, squares, detach_coupling
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
    detach_coupling: bool,
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
    detach_coupling: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, weight, a, k, p, q, beta and prior, of size 0 where not `needed`.

    `needed` has eight entries. The gradients of k and p may be needed even if k and p are absent,
    because the gradient of r is computed from them. With `detach_coupling`, those of k, p, q and
    prior are not needed.
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
        detach_coupling,
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
    *features, edges, parents, rows, leak, squares, detach_coupling = inputs
    N, S, _, kept = output
    ctx.save_for_backward(N, S, kept, *features, *edges)
    ctx.numbers = parents, rows, leak, squares, detach_coupling


def _gradients(
    ctx: Any, dN: Tensor, dS: Tensor, dQ: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    N, S, kept, *saved = ctx.saved_tensors
    features, edges = saved[:9], saved[9:]
    *_, squares, detach_coupling = ctx.numbers
    *_, p, q, _, _ = features
    of_u, of_weight, of_a, of_r, of_k, of_p, of_q, of_beta, of_prior = ctx.needs_input_grad[:9]
    if detach_coupling:
        of_k = of_p = of_q = of_prior = False
    else:
        of_k = of_k or (of_r and p is not None)  # the gradient of r is computed from these
        of_p = of_p or (of_r and q is not None)
    needed = [of_u, of_weight, of_a, of_k, of_p, of_q, of_beta, of_prior]
    found = differentiate_couple(dN, dS, dQ, kept, *features, edges, *ctx.numbers, needed)
    du, dweight, da, dk, dp, dq, dbeta, dprior = found
    dr = None
    if of_r:
        dr = -N.unsqueeze(-1) * dS
        dr = dr - 2 * dQ * S if squares else dr
        dr = dr - p * dk.unsqueeze(-1) if p is not None and of_k else dr
        dr = dr - 2 * q * dp if q is not None and of_p else dr
    gradients = (du, dweight, da, dr, dk, dp, dq, dbeta, dprior)
    computed = (of_u, of_weight, of_a, of_r, of_k, of_p, of_q, of_beta, of_prior)
    asked = ctx.needs_input_grad[:9]
    return tuple(x if n and m else None for x, n, m in zip(gradients, computed, asked, strict=True))


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse_second(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "engine 'fused' has first derivatives only; use engine='scatter' for the second"
    )


OF_FEATURES = (0, None, *[0] * 5, None, None)  # u, weight, a, r, k, p, q, beta, prior
differentiate_couple = transformable(
    couple_backward,
    Samples((0, 0, 0, 1, *OF_FEATURES), (0, None, *[0] * 4, None, None)),
    _keep_nothing,
    _refuse_second,
)
run_couple = transformable(couple, Samples(OF_FEATURES, (0, 0, 0, 1)), _keep, _gradients)


@torch.library.custom_op("graphcaps::dynamic_routing", mutates_args=(), device_types="cpu")
def dynamic_routing(
    u: Tensor,
    weight: Tensor,
    edges: Sequence[Tensor],
    parents: int,
    complete: bool,
    iterations: int,
    through_all: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic routing: v `[B, J, D]`, and features of parents and of children for the backward.

    These features have the batch in their second dimension, or size 0; otherwise they depend on the
    device. For `complete`, see `TritonEdges`.
    """
    return dynamic_cpu.dynamic_routing(u, weight, edges, parents, complete, iterations, through_all)


@dynamic_routing.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from graphcaps.kernels.triton import dynamic as dynamic_cuda

    return dynamic_cuda.dynamic_routing(*args)


@dynamic_routing.register_fake
def _(
    u: Tensor,
    weight: Tensor,
    edges: Sequence[Tensor],
    parents: int,
    complete: bool,
    iterations: int,
    through_all: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    v = u.new_empty(u.shape[0], parents, weight.shape[2])
    if u.device.type != "cuda":
        return v, v.new_empty(iterations, *v.shape), v.new_empty(0)
    of_parents = v.new_empty(2 * iterations, *v.shape, dtype=torch.float32)
    return v, of_parents, of_parents.new_empty(2 * iterations, *u.shape[:2])


@torch.library.custom_op("graphcaps::dynamic_routing_backward", mutates_args=(), device_types="cpu")
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
    """The gradients of u and weight, of size 0 where not `needed`."""
    return dynamic_cpu.dynamic_routing_backward(
        dv, of_parents, of_children, u, weight, edges, parents, complete, through_all, needed
    )


@dynamic_routing_backward.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    from graphcaps.kernels.triton import dynamic as dynamic_cuda

    return dynamic_cuda.dynamic_routing_backward(*args)


@dynamic_routing_backward.register_fake
def _(
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
    return (
        u.new_empty(u.shape if needed[0] else 0),
        u.new_empty(weight.shape if needed[1] else 0),
    )


def _keep_dynamic(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, weight, edges, parents, complete, _, through_all = inputs
    ctx.save_for_backward(*output[1:], u, weight, *edges)
    ctx.sizes = parents, complete, through_all


def _dynamic_gradients(ctx: Any, dv: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    of_parents, of_children, u, weight, *edges = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:2])
    found = differentiate_dynamic_routing(
        dv, of_parents, of_children, u, weight, edges, *ctx.sizes, needed
    )
    return tuple(x if n else None for x, n in zip(found, needed, strict=True))


differentiate_dynamic_routing = transformable(
    dynamic_routing_backward,
    Samples((0, 1, 1, 0, None), (0, None)),
    _keep_nothing,
    _refuse_second,
)
run_dynamic_routing = transformable(
    dynamic_routing, Samples((0, None), (0, 1, 1)), _keep_dynamic, _dynamic_gradients
)
