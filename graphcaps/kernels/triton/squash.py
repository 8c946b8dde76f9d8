"""Kernels for squash of the parents' sums and its gradient."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations  # tl.constexpr is not there without triton

from typing import Any

from torch import Tensor

from graphcaps.kernels.triton import device
from graphcaps.kernels.triton.device import blocks, jit, power_of_two, tl
from graphcaps.kernels.triton.parents import sum_of_parts


def squash_sums(
    partial: Tensor, s: Tensor, earlier: Tensor, later: Tensor | None, v: Tensor
) -> None:
    """s and squash(s) from partial sums, and V of the next iteration, or v after the last."""
    device.launch(
        squash_sums_kernel,
        (blocks(s.numel(), 512),),
        s,
        partial=partial,
        parts=len(partial),
        s=s,
        earlier=None if later is None else earlier,
        out=v if later is None else later,
        **_sizes(s),
    )


@jit
def squash_sums_kernel(
    partial,
    parts,
    s,
    earlier,
    out,
    rows,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of parents."""
    place, there = _places(rows, D, BLOCK_ROWS, BLOCK_D)
    total = sum_of_parts(partial, place, there, parts, tl.cast(rows, tl.int64) * D)
    tl.store(s + place, total, mask=there)
    square = tl.sum(total * total, 1, keep_dims=True)
    v = total * (tl.sqrt_rn(square) / (1 + square))
    if earlier is not None:
        v += tl.load(earlier + place, mask=there, other=0.0)
    tl.store(out + place, v, mask=there)


def differentiate_squash(
    dv: Tensor, partial: Tensor | None, s: Tensor, ds: Tensor, total: Tensor | None
) -> None:
    """The gradient of s from that of v plus partial sums; also returns their total if wanted."""
    device.launch(
        differentiate_squash_kernel,
        (blocks(s.numel(), 512),),
        s,
        dv=dv,
        partial=partial,
        parts=0 if partial is None else len(partial),
        s=s,
        ds=ds,
        total=total,
        **_sizes(s),
    )


@jit
def differentiate_squash_kernel(
    dv,
    partial,
    parts,
    s,
    ds,
    total,
    rows,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of parents."""
    place, there = _places(rows, D, BLOCK_ROWS, BLOCK_D)
    gradient = tl.load(dv + place, mask=there, other=0.0).to(tl.float32)
    if partial is not None:
        gradient += sum_of_parts(partial, place, there, parts, tl.cast(rows, tl.int64) * D)
    if total is not None:
        tl.store(total + place, gradient, mask=there)
    here = tl.load(s + place, mask=there, other=0.0)
    square = tl.sum(here * here, 1, keep_dims=True)
    norm = tl.sqrt_rn(square)
    # squash is |s|/(1+|s|²) times s; at s = 0 both terms are 0, and no division by 0 occurs
    unit = here / tl.where(norm > 0, norm, 1.0)
    along = tl.sum(unit * gradient, 1, keep_dims=True)
    # no power of |s| above the second is computed: it would overflow where squash does not
    slope = (1 - square) / (1 + square) * along * unit
    tl.store(ds + place, norm / (1 + square) * (gradient + slope), mask=there)


@jit
def _places(rows, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of parents' numbers, [BLOCK_ROWS, BLOCK_D], and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    return row[:, None] * D + d, (row < rows)[:, None] & (d < D)


def _sizes(s: Tensor) -> dict[str, Any]:
    BLOCK_D = power_of_two(s.shape[-1])
    return dict(
        rows=s[..., 0].numel(),
        D=s.shape[-1],
        BLOCK_ROWS=max(1, 512 // BLOCK_D),
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
