"""The last pass of a backward: the gradients of poses, and of matrices, beta and prior."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations  # tl.constexpr is not there without triton

import torch
from torch import Tensor

from graphcaps.kernels.triton import device
from graphcaps.kernels.triton.arguments import Orders, Pass
from graphcaps.kernels.triton.device import blocks, jit, tl
from graphcaps.kernels.triton.parents import add_parts
from graphcaps.kernels.triton.terms import (
    along_pose,
    block_of_samples,
    coupling,
    dot,
    edge_of,
    from_reference,
    gradient_of_logit,
    group,
    matrix,
    moved,
    places_in_matrix,
    places_of_child,
    pose_of_child,
    program,
    slope,
    times_activation,
    value,
    votes,
    weight_of_vote,
    zeros_of_poses,
)


@jit
def gradient_of_vote(run, edge):
    """∂û = Σ_r ( w (∂S + 2 ∂Q∘y) + λ (p + 2 q∘y) ), a g and λ of one edge.

    Without a mean there is no λ: the logits are equal, or treated as constants.
    """
    u_hat = votes(run, edge)
    total = zeros_of_poses(run)
    of_logit = tl.zeros([run.size.BLOCK_B], tl.float32)
    of_weight = tl.zeros([run.size.BLOCK_B], tl.float32)
    for iteration in tl.static_range(run.size.R):
        at = moved(run, edge, iteration)
        y = from_reference(run, at, u_hat)
        c = coupling(run, at, y)
        if run.gradients.linear is not None or run.gradients.square is not None:
            w = weight_of_vote(run, at, c)
            total += along_pose(run, w) * slope(at, run.gradients, y)
        of_weight += times_activation(run, at, value(run, at, run.gradients, y))
        if run.softmax.mean is not None:
            gradient = gradient_of_logit(run, at, y, c)
            of_logit += gradient
            if run.logits.linear is not None or run.logits.square is not None:
                total += along_pose(run, gradient) * slope(at, run.logits, y)
    return total, of_weight, of_logit


def gradient_of_poses(run: Pass, orders: Orders) -> Tensor:
    """∂u = Σ W ∂û over the edges of each child."""
    inputs, size = run.inputs, run.size
    du = torch.empty_like(inputs.u)
    programs = inputs.I * blocks(inputs.B, size.BLOCK_B.value)
    device.launch(
        gradient_of_poses_kernel,
        (programs, blocks(size.K.value, size.BLOCK_K.value)),
        inputs.u,
        run=run,
        edges=orders.by_child,
        du=du,
        **size.options_of_sums,
    )
    return du


@jit
def gradient_of_poses_kernel(run, edges, du):
    """One child, a block of samples and a block of K."""
    child, block = program(run, run.inputs.I)
    first_k = tl.program_id(1) * run.size.BLOCK_K
    shape: tl.constexpr = [run.size.BLOCK_B * run.size.BLOCK_P, run.size.BLOCK_K]
    total = tl.zeros(shape, tl.float32)
    start, stop = tl.load(edges.start + child), tl.load(edges.start + child + 1)
    step = group(stop - start, run.size.D)
    for head in range(start, stop, step):
        part = tl.zeros(shape, tl.float32)
        for e in range(head, tl.minimum(head + step, stop)):
            parent, kind = tl.load(edges.parent + e), tl.load(edges.kind + e)
            edge = edge_of(run, block, child, parent, kind)
            gradient, _, _ = gradient_of_vote(run, edge)
            part = dot(gradient, tl.trans(matrix(run, kind, first_k)), part)
        total += part
    place, there = places_of_child(run, block, child, first_k)
    tl.store(du + place, total, mask=there)


def gradients_of_kinds(
    run: Pass, orders: Orders, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂W = Σ u ⊗ ∂û, ∂beta = Σ a g and ∂prior = Σ λ over the edges of a kind and all samples."""
    if not any(needed):
        return None, None, None
    inputs, size = run.inputs, run.size
    kinds = len(inputs.weight)
    sample_blocks = blocks(inputs.B, size.BLOCK_B.value)
    pairs = blocks(len(orders.by_kind.child), max(1, kinds)) * sample_blocks
    parts = max(1, min(blocks(device.PROGRAMS, max(1, kinds)), pairs))
    alone = inputs.weight.dtype if parts == 1 else torch.float32
    shapes_and_dtypes = (
        ((parts, *inputs.weight.shape), alone),
        ((parts, kinds), torch.float32),
        ((parts, kinds), torch.float32),
    )
    partial = [
        inputs.u.new_empty(shape, dtype=dtype) if need else None
        for (shape, dtype), need in zip(shapes_and_dtypes, needed, strict=True)
    ]
    dweight, dbeta, dprior = partial
    k_blocks = blocks(size.K.value, size.BLOCK_K.value) if needed[0] else 1
    device.launch(
        gradients_of_kinds_kernel,
        (kinds, k_blocks, parts),
        inputs.u,
        run=run,
        edges=orders.by_kind,
        kinds=kinds,
        dweight=dweight,
        dbeta=dbeta,
        dprior=dprior,
        **size.options_of_sums,
    )
    dweight, dbeta, dprior = (x if x is None else add_parts(x) for x in partial)
    return None if dweight is None else dweight.to(inputs.weight.dtype), dbeta, dprior


@jit
def gradients_of_kinds_kernel(run, edges, kinds, dweight, dbeta, dprior):
    """One kind, a block of K, and a part of its pairs of an edge and a block of samples."""
    kind, part = tl.program_id(0), tl.program_id(2)
    first_k = tl.program_id(1) * run.size.BLOCK_K
    total = tl.zeros([run.size.BLOCK_K, run.size.BLOCK_D], tl.float32)
    of_beta, of_prior = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    start, stop = tl.load(edges.start + kind), tl.load(edges.start + kind + 1)
    sample_blocks = tl.cdiv(run.inputs.B, run.size.BLOCK_B)
    # with n parts, every nth pair of an edge and a block of samples
    parts = tl.num_programs(2).to(tl.int64)
    pairs = (stop - start).to(tl.int64) * sample_blocks
    rows = tl.maximum(tl.minimum(run.inputs.B, run.size.BLOCK_B), 1) * run.size.P
    step = group(tl.cdiv(pairs, parts), rows) * parts
    for head in range(part.to(tl.int64), pairs, step):
        group_total = tl.zeros([run.size.BLOCK_K, run.size.BLOCK_D], tl.float32)
        group_beta, group_prior = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
        for pair in range(head, tl.minimum(head + step, pairs), parts):
            e = start + pair // sample_blocks
            child, parent = tl.load(edges.child + e), tl.load(edges.parent + e)
            block = block_of_samples(run, pair % sample_blocks)
            edge = edge_of(run, block, child, parent, kind)
            gradient, of_weight, of_logit = gradient_of_vote(run, edge)
            if dweight is not None:
                pose = pose_of_child(run, block, child, first_k)
                group_total = dot(tl.trans(pose), gradient, group_total)
            if dbeta is not None:
                group_beta += tl.sum(of_weight, 0)
            if dprior is not None:
                group_prior += tl.sum(of_logit, 0)
        total += group_total
        of_beta += group_beta
        of_prior += group_prior
    place_of_kind = part.to(tl.int64) * kinds + kind
    if dweight is not None:
        place, there = places_in_matrix(run, place_of_kind, first_k)
        tl.store(dweight + place, total, mask=there)
    if tl.program_id(1) == 0:
        if dbeta is not None:
            tl.store(dbeta + place_of_kind, of_beta)
        if dprior is not None:
            tl.store(dprior + place_of_kind, of_prior)
