"""Derivatives and `vmap` of the kernels' operations, also where `torch.func` transforms them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcaps.tracing import under_torch_func


class Samples(NamedTuple):
    """Which dimension numbers the samples, in the tensors of an operation; None where they share.

    Attributes:
        inputs: of the tensors that the operation takes first; edges and numbers follow.
        outputs: of the tensors that it gives. Where samples share one of them, the operation's
            last argument says which are needed.
    """

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


def transformable(
    operation: Any,
    samples: Samples,
    keep: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """Give an operation derivatives, and its batching rule.

    `torch.func` takes the derivatives of a `torch.autograd.Function` and not those registered for
    an operation; traces take the operation, as one node. So it has both, of the same functions.

    Args:
        operation: from `torch.library.custom_op`: takes tensors, a list of the graph's tensors,
            and numbers.
        samples: which dimension of its tensors numbers the samples.
        keep: puts on the context what `gradients` needs of inputs and outputs.
        gradients: takes the context and the gradients of the outputs, gives those of the tensors.

    Returns:
        The operation as it is to be called.
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
    """What `run` gives for each index of the mapped dimension, which is the first of the results.

    As so many more samples in one call; one call after the other, where samples would share what
    is to stay apart.
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
    """`[V, …, B, …]` to `[…, V·B, …]`, with B at `dim` of the rest; `[V, 0]`, of what is absent."""
    return x.flatten() if x.dim() == 2 else x.movedim(0, dim).flatten(dim, dim + 1)


def _apart(x: Tensor, dim: int | None, size: int) -> Tensor:
    """`[…, V·B, …]` to `[V, …, B, …]`; `[0]`, of what is absent, to `[V, 0]`."""
    if x.dim() == 1 or dim is None:
        return x.expand(size, *x.shape)
    return x.unflatten(dim, (size, x.shape[dim] // size)).movedim(dim, 0)
