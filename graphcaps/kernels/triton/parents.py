"""Kernels with one program per parent: sums of 1, y and y² over its edges.

If there are few parents, each sum is split into parts.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations  # tl.constexpr is not there without triton

from collections.abc import Sequence

import torch
from torch import Tensor

from graphcaps.kernels.triton import device
from graphcaps.kernels.triton.arguments import Orders, Pass, Quadratic
from graphcaps.kernels.triton.device import blocks, jit, tl
from graphcaps.kernels.triton.terms import (
    along_pose,
    coupling,
    edge_of,
    from_reference,
    gradient_of_logit,
    group,
    moved,
    program,
    votes,
    weight_of_vote,
    zeros_of_poses,
)

EDGES_OF_PART = 64  # the least number of a parent's edges in a part
BLOCK = 1024  # sums per program that adds parts


def partial_sums(run: Pass, orders: Orders, wanted: Sequence[bool]) -> Quadratic:
    """Σ w, Σ w y and Σ w y², or with `run.softmax.mean` Σ λ, Σ λ y and Σ λ y², those wanted.

    Returns:
        Sums over parts of the edges, `[parts, B, J]` and `[parts, B, J, P·D]`.
    """
    inputs, size = run.inputs, run.size
    degree = blocks(len(orders.by_parent.child), max(1, inputs.J))
    # depends only on the graph, so that the order of summation does not depend on the batch
    parts = min(blocks(device.PROGRAMS, max(1, inputs.J)), blocks(degree, EDGES_OF_PART))
    parts = max(1, parts)
    numbers = (parts, inputs.B, inputs.J)
    poses = (*numbers, size.P.value * size.D.value)
    sums = Quadratic(
        *(
            inputs.u.new_empty(shape, dtype=torch.float32) if want else None
            for shape, want in zip((numbers, poses, poses), wanted, strict=True)
        )
    )
    programs = inputs.J * blocks(inputs.B, size.BLOCK_B.value)
    device.launch(
        partial_sums_kernel,
        (programs, 1, parts),
        inputs.u,
        run=run,
        edges=orders.by_parent,
        sums=sums,
        **size.options_of_sums,
    )
    return sums


@jit
def partial_sums_kernel(run, edges, sums):
    """One parent, a block of samples and a part of its edges."""
    parent, block = program(run, run.inputs.J)
    constant = tl.zeros([run.size.BLOCK_B], tl.float32)
    linear, square = zeros_of_poses(run), zeros_of_poses(run)
    start, stop = tl.load(edges.start + parent), tl.load(edges.start + parent + 1)
    length = tl.cdiv(stop - start, tl.num_programs(2))
    start += tl.program_id(2) * length
    stop = tl.minimum(start + length, stop)
    step = group(length, 1)
    for head in range(start, stop, step):
        part = tl.zeros([run.size.BLOCK_B], tl.float32)
        linear_part, square_part = zeros_of_poses(run), zeros_of_poses(run)
        for e in range(head, tl.minimum(head + step, stop)):
            child, kind = tl.load(edges.child + e), tl.load(edges.kind + e)
            edge = edge_of(run, block, child, parent, kind)
            y = from_reference(run, edge, votes(run, edge))
            c = coupling(run, edge, y)
            if run.softmax.mean is not None:
                x = gradient_of_logit(run, edge, y, c)
            else:
                x = weight_of_vote(run, edge, c)
            part += x
            if sums.linear is not None or sums.square is not None:
                term = along_pose(run, x) * y
                linear_part += term
                if sums.square is not None:
                    square_part += term * y
        constant += part
        linear += linear_part
        square += square_part
    part_of_sum = moved(run, edge_of(run, block, 0, parent, 0), tl.program_id(2))
    if sums.constant is not None:
        tl.store(sums.constant + part_of_sum.at_parent, constant, mask=block.there)
    if sums.linear is not None:
        tl.store(sums.linear + part_of_sum.at_pose, linear, mask=part_of_sum.pose_there)
    if sums.square is not None:
        tl.store(sums.square + part_of_sum.at_pose, square, mask=part_of_sum.pose_there)


def add_parts(partial: Tensor) -> Tensor:
    """Add partial sums, `[parts, …]`, in an order that does not depend on the batch."""
    if len(partial) == 1:
        return partial[0]
    total = torch.empty_like(partial[0])
    device.launch(
        add_parts_kernel,
        (blocks(total.numel(), BLOCK),),
        partial,
        partial=partial,
        total=total,
        parts=len(partial),
        count=total.numel(),
        BLOCK=BLOCK,
    )
    return total


@jit
def add_parts_kernel(partial, total, parts, count, BLOCK: tl.constexpr):
    """A block of sums."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    tl.store(total + place, sum_of_parts(partial, place, there, parts, count), mask=there)


@jit
def sum_of_parts(partial, place, there, parts, count):
    """Add partial sums at one place in order; consecutive parts are `count` numbers apart."""
    total = tl.zeros(place.shape, tl.float32)
    step = group(parts, 1)
    for head in range(0, parts, step):
        group_total = tl.zeros(place.shape, tl.float32)
        for part in range(head, tl.minimum(head + step, parts)):
            offset = tl.cast(part, tl.int64) * count
            group_total += tl.load(partial + offset + place, mask=there, other=0.0)
        total += group_total
    return total
