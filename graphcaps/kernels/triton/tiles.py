"""Dynamic routing on a complete graph, with a child's votes for all parents in registers."""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005, a kernel has no **

from __future__ import annotations  # tl.constexpr is not there without triton

import math

import torch
from torch import Tensor

from graphcaps.kernels.triton import device
from graphcaps.kernels.triton.arguments import Pass, Sizes, fewest_terms
from graphcaps.kernels.triton.device import blocks, jit, power_of_two, tl
from graphcaps.kernels.triton.terms import (
    dot,
    edge_of,
    matrix,
    moved,
    pose_of_child,
    program,
    value,
    zeros_of_poses,
)

WIDEST_TILE = 320  # largest J·D: the votes for more parents do not fit in registers
LONGEST_POSE = 32  # largest K, for the same reason
MOST_TILES = 64  # of children, but no more than the square root of them in a tile


def sizes_of_tiles(parents: int, size: Sizes) -> Sizes | None:
    """Block sizes for the tiles of a complete graph, or None if there are too many votes."""
    K, BLOCK_D = size.K.value, max(16, power_of_two(size.D.value))
    width = parents * BLOCK_D
    if width > WIDEST_TILE or K > LONGEST_POSE:
        return None
    return size._replace(
        BLOCK_B=tl.constexpr(32 if width <= WIDEST_TILE // 2 else 16),
        BLOCK_K=tl.constexpr(max(fewest_terms(), power_of_two(K))),  # all of K at once
        BLOCK_D=tl.constexpr(BLOCK_D),
    )


def partial_sums(run: Pass) -> Tensor:
    """Σ c û and the softmax, or with `run.softmax.mean` Σ λ û and Σ c g.

    Returns:
        Sums over tiles of children, `[tiles, B, J, D]`.
    """
    inputs, size = run.inputs, run.size
    # depends only on the graph, so that the order of summation does not depend on the batch
    children_of_tile = max(8, min(blocks(inputs.I, MOST_TILES), math.isqrt(inputs.I)))
    tiles = blocks(inputs.I, children_of_tile)
    shape = (tiles, inputs.B, inputs.J, size.D.value)
    partial = inputs.u.new_empty(shape, dtype=torch.float32)
    device.launch(
        partial_sums_kernel,
        (tiles * blocks(inputs.B, size.BLOCK_B.value),),
        inputs.u,
        run=run,
        tiles=tiles,
        children_of_tile=children_of_tile,
        partial=partial,
        PARENTS=inputs.J,
        num_warps=4,
    )
    return partial


@jit
def partial_sums_kernel(run, tiles, children_of_tile, partial, PARENTS: tl.constexpr):
    """One tile of children and a block of samples."""
    tile, block = program(run, tiles)
    totals = ()  # one entry for each parent, as in all tuples here
    for _ in tl.static_range(PARENTS):
        totals = totals + (zeros_of_poses(run),)
    first = tile * children_of_tile
    for child in range(first, tl.minimum(first + children_of_tile, run.inputs.I)):
        pose = pose_of_child(run, block, child, 0)
        u_hats, logits = (), ()
        most = tl.full([run.size.BLOCK_B], float("-inf"), tl.float32)
        for parent in tl.static_range(PARENTS):
            edge = edge_of(run, block, child, parent, 0)
            kind = tl.cast(child, tl.int64) * PARENTS + parent
            u_hat = dot(pose, matrix(run, kind, 0), zeros_of_poses(run))
            logit = value(run, edge, run.logits, u_hat)
            most = tl.maximum(most, logit)
            u_hats, logits = u_hats + (u_hat,), logits + (logit,)
        power = tl.zeros([run.size.BLOCK_B], tl.float32)
        for parent in tl.static_range(PARENTS):
            power += tl.exp(logits[parent] - most)
        coefficients, mean = (), tl.zeros([run.size.BLOCK_B], tl.float32)
        for parent in tl.static_range(PARENTS):
            c = tl.exp(logits[parent] - most) / power
            if run.softmax.mean is not None:
                edge = edge_of(run, block, child, parent, 0)
                g = value(run, edge, run.gradients, u_hats[parent])
                mean += c * g
                coefficients = coefficients + ((c, g),)
            else:
                coefficients = coefficients + ((c,),)
        sums = ()
        for parent in tl.static_range(PARENTS):
            x = coefficients[parent][0]
            if run.softmax.mean is not None:
                x *= coefficients[parent][1] - mean
            sums = sums + (totals[parent] + x[:, None] * u_hats[parent],)
        totals = sums
        place = block.sample * run.inputs.I + child
        if run.softmax.mean is not None:
            tl.store(run.softmax.mean + place, mean, mask=block.there)
        elif run.softmax.most is not None:
            tl.store(run.softmax.most + place, most, mask=block.there)
            tl.store(run.softmax.total + place, power, mask=block.there)
    for parent in tl.static_range(PARENTS):
        edge = moved(run, edge_of(run, block, 0, parent, 0), tile)
        tl.store(partial + edge.at_pose, totals[parent], mask=edge.pose_there)
