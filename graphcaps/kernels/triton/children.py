"""Kernels with one program per child: the softmax of its logits, and the means for its gradient."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations  # tl.constexpr is not there without triton

from torch import Tensor

from graphcaps.kernels.triton import device
from graphcaps.kernels.triton.arguments import Orders, Pass
from graphcaps.kernels.triton.device import blocks, jit, tl
from graphcaps.kernels.triton.terms import (
    coupling,
    edge_of,
    from_reference,
    group,
    logit,
    program,
    value,
    votes,
)


def softmax(run: Pass, orders: Orders, leak: bool = False) -> None:
    """Write the largest logit of each child and the sum of exp(b − largest) to `run.softmax`."""
    device.launch(
        softmax_kernel,
        _grid(run),
        run.inputs.u,
        run=run,
        edges=orders.by_child,
        LEAK=leak,
        **run.size.options,
    )


@jit
def softmax_kernel(run, edges, LEAK: tl.constexpr):
    """One child and a block of samples: online softmax, in one pass over the child's edges."""
    child, block = program(run, run.inputs.I)
    # with a leak, start from one more logit, 0; otherwise from −∞
    most = tl.full([run.size.BLOCK_B], 0.0 if LEAK else -3.4028234663852886e38, tl.float32)
    total = tl.full([run.size.BLOCK_B], 1.0 if LEAK else 0.0, tl.float32)
    start, stop = tl.load(edges.start + child), tl.load(edges.start + child + 1)
    step = group(stop - start, 1)
    for head in range(start, stop, step):
        before, part = most, tl.zeros([run.size.BLOCK_B], tl.float32)
        for e in range(head, tl.minimum(head + step, stop)):
            parent, kind = tl.load(edges.parent + e), tl.load(edges.kind + e)
            edge = edge_of(run, block, child, parent, kind)
            b = logit(run, edge, from_reference(run, edge, votes(run, edge)))
            higher = tl.maximum(most, b)
            # NaN never becomes the largest logit, but remains in the sum
            part = part * tl.exp(most - higher) + tl.exp(b - higher)
            most = higher
        total = total * tl.exp(before - most) + part
    place = block.sample * run.inputs.I + child
    tl.store(run.softmax.most + place, most, mask=block.there)
    tl.store(run.softmax.total + place, total, mask=block.there)


def means(run: Pass, orders: Orders, da: Tensor | None = None) -> None:
    """Write Σ c g of each child to `run.softmax.mean`, and ∂a = Σ (c + beta) g to `da`."""
    device.launch(
        means_kernel,
        _grid(run),
        run.inputs.u,
        run=run,
        edges=orders.by_child,
        da=da,
        **run.size.options,
    )


@jit
def means_kernel(run, edges, da):
    """One child and a block of samples."""
    child, block = program(run, run.inputs.I)
    mean = tl.zeros([run.size.BLOCK_B], tl.float32)
    beside = tl.zeros([run.size.BLOCK_B], tl.float32)
    start, stop = tl.load(edges.start + child), tl.load(edges.start + child + 1)
    step = group(stop - start, 1)
    for head in range(start, stop, step):
        part = tl.zeros([run.size.BLOCK_B], tl.float32)
        part_beside = tl.zeros([run.size.BLOCK_B], tl.float32)
        for e in range(head, tl.minimum(head + step, stop)):
            parent, kind = tl.load(edges.parent + e), tl.load(edges.kind + e)
            edge = edge_of(run, block, child, parent, kind)
            y = from_reference(run, edge, votes(run, edge))
            g = value(run, edge, run.gradients, y)
            part += coupling(run, edge, y) * g
            if run.inputs.beta is not None:
                part_beside += tl.load(run.inputs.beta + edge.kind).to(tl.float32) * g
        mean += part
        beside += part_beside
    place = block.sample * run.inputs.I + child
    if run.softmax.mean is not None:
        tl.store(run.softmax.mean + place, mean, mask=block.there)
    if da is not None:
        tl.store(da + place, mean + beside, mask=block.there)


def _grid(run: Pass) -> tuple[int, ...]:
    """One program for each child and block of samples."""
    return (run.inputs.I * blocks(run.inputs.B, run.size.BLOCK_B.value),)
