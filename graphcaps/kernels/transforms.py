"""Derivatives and `vmap` for the kernels' operations, under autograd and under `torch.func`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcaps.tracing import under_torch_func


class Samples(NamedTuple):
    """The batch dimension of each tensor of an operation; None for tensors that samples share.

    Attributes:
        inputs: for the tensors that the operation takes first; edges and numbers follow.
        outputs: for the tensors that it returns. If samples share one of them, the last argument
            of the operation says which outputs are needed.
    """

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


def transformable(
    operation: Any,
    samples: Samples,
    keep: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """Give an operation derivatives and a batching rule.

    `torch.func` uses the derivatives of a `torch.autograd.Function`, but not those registered for
    a custom operation; traces need the custom operation, as one node. Both are defined here, from
    the same functions.

    Args:
        operation: from `torch.library.custom_op`: takes tensors, a list of the graph's tensors,
            and numbers.
        samples: the batch dimension of each of its tensors.
        keep: saves on the context the inputs and outputs that `gradients` needs.
        gradients: takes the context and the gradients of the outputs, and returns those of the
            tensors.

    Returns:
        The function to call instead of the operation.
    """
    count = len(samples.inputs)

    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        def run(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
            return call(*tensors, *inputs[count:])

        needed = inputs[-1] if None in samples.outputs else ()
        sharing = any(n for n, dim in zip(needed, samples.outputs, strict=False) if dim is None)
        found = _mapped(run, inputs[:count], in_dims[:count], info.batch_size, samples, sharing)
        return found, (0,) * len(found)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return operation(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.others = len(inputs) - count
            keep(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor | None, ...]:
            return (*gradients(ctx, *of_outputs), *[None] * ctx.others)

        vmap = staticmethod(rule)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        edges, *numbers = inputs[count:]
        ctx.others = [None] * len(edges), *[None] * len(numbers)
        keep(ctx, inputs, output)

    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Any, ...]:
        return (*gradients(ctx, *of_outputs), *ctx.others)

    def call(*inputs: Any) -> Any:
        return Transformed.apply(*inputs) if under_torch_func() else operation(*inputs)

    operation.register_autograd(backward, setup_context=setup_context)
    operation.register_vmap(rule)
    return call


def _mapped(
    run: Callable[[Sequence[Tensor | None]], tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    dims: Sequence[int | None],
    size: int,
    samples: Samples,
    sharing: bool,
) -> tuple[Tensor, ...]:
    """Apply `run` to each index of the mapped dimension, which becomes the first of the results.

    The mapped dimension is merged with the batch, for one call. If a tensor that samples share is
    mapped, or its gradient is needed, there is one call for each index instead.
    """
    moved = [
        x if x is None or d is None else x.movedim(d, 0) for x, d in zip(tensors, dims, strict=True)
    ]
    mapped = [d is not None for d in dims]
    if sharing or any(m for m, d in zip(mapped, samples.inputs, strict=True) if d is None):
        calls = (
            run([x[n] if x is not None and m else x for x, m in zip(moved, mapped, strict=True)])
            for n in range(size)
        )
        return tuple(map(torch.stack, zip(*calls, strict=True)))
    found = run(
        [
            x if x is None or d is None else _as_samples(x if m else x.expand(size, *x.shape), d)
            for x, m, d in zip(moved, mapped, samples.inputs, strict=True)
        ]
    )
    return tuple(_apart(x, d, size) for x, d in zip(found, samples.outputs, strict=True))


def _as_samples(x: Tensor, dim: int) -> Tensor:
    """`[V, …, B, …]` to `[…, V·B, …]`, with V·B at `dim`; `[V, 0]`, an absent tensor, to `[0]`."""
    return x.flatten() if x.dim() == 2 else x.movedim(0, dim).flatten(dim, dim + 1)


def _apart(x: Tensor, dim: int | None, size: int) -> Tensor:
    """`[…, V·B, …]` to `[V, …, B, …]`; `[0]`, an absent tensor, to `[V, 0]`."""
    if x.dim() == 1 or dim is None:
        return x.expand(size, *x.shape)
    return x.unflatten(dim, (size, x.shape[dim] // size)).movedim(dim, 0)
