"""The arguments of the kernels, grouped in NamedTuples, which Triton kernels accept.

A field that is None is known when the kernel is compiled, so that absent terms cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from graphcaps.kernels.edges import SortedEdges
from graphcaps.kernels.triton.device import blocks, power_of_two, release, tl

TILE = 1024  # numbers in a block of votes
LARGEST_TILE = 8192  # for long poses; more does not fit in the shared memory of every GPU


class Sizes(NamedTuple):
    """Sizes that are compile-time constants of a kernel.

    A tile of votes is [BLOCK_B·BLOCK_P, BLOCK_D]: the rows of matrix poses are merged with the
    samples, so that û = Wᵀu is one matrix product for all of them.
    """

    K: Any
    D: Any
    P: Any  # rows of a matrix pose; 1 for vectors
    R: Any  # iterations whose gradients are computed at once
    BLOCK_B: Any  # samples of a program
    BLOCK_P: Any
    BLOCK_K: Any
    BLOCK_D: Any

    @property
    def options(self) -> dict[str, int]:
        """Compiler options for a kernel of these sizes."""
        pose = self.BLOCK_P.value * self.BLOCK_D.value
        return dict(
            num_warps=min(8, max(2, self.BLOCK_B.value * pose // 256)),
            # each pipeline stage needs shared memory for the features of parents in every iteration
            num_stages=3 if pose <= 64 and self.R.value <= 4 else 1,
        )

    @property
    def options_of_sums(self) -> dict[str, int]:
        """Options for kernels that accumulate poses or matrices, which need more registers."""
        warps = min(8, 2 * self.options["num_warps"])
        # otherwise ptxas may spill registers for a higher occupancy
        return self.options | dict(num_warps=warps, maxnreg=255)


def sizes(batch: int, K: int, D: int, P: int = 1) -> Sizes:
    """Choose block sizes that fit in registers and shared memory.

    Args:
        batch: B.
        K, D: length of a row of a child's and of a parent's pose.
        P: number of rows.

    Raises:
        ValueError: the parents' poses are too long.
    """
    terms = fewest_terms()
    BLOCK_D, BLOCK_P = max(terms, power_of_two(D)), power_of_two(P)
    fewest = blocks(16, BLOCK_P)  # samples
    if fewest * BLOCK_P * BLOCK_D > LARGEST_TILE:
        raise ValueError(
            f"expected poses of parents of at most {LARGEST_TILE // 16} numbers, or {LARGEST_TILE} "
            f"in at least 16 rows, each number rounded up to a power of two; got {P} rows of {D}; "
            "use engine='scatter'"
        )
    BLOCK_B = max(fewest, min(power_of_two(batch), blocks(TILE, BLOCK_P * BLOCK_D)))
    # a larger block of W does not fit in shared memory
    BLOCK_K = max(terms, min(power_of_two(K), 32, 2048 // BLOCK_D))
    numbers = K, D, P, 1, BLOCK_B, BLOCK_P, BLOCK_K, BLOCK_D
    return Sizes(*map(tl.constexpr, numbers))


def fewest_terms() -> int:
    """The least inner dimension of `tl.dot` in float32, which depends on Triton's release."""
    return 8 if release() >= (3, 8) else 16


class Inputs(NamedTuple):
    """Features and sizes of a pass; those that differ between iterations have R entries."""

    u: Any  # [B, I, P·K]
    weight: Any  # [M, K, D]
    a: Any  # [B, I], activations of children
    r: Any  # [R, B, J, P·D], reference points of parents
    beta: Any  # [M], added to the coupling
    prior: Any  # [M], added to the logit
    B: Any
    I: Any  # noqa: E741
    J: Any


class Quadratic(NamedTuple):
    """Coefficients of parents in constant + linear·y + square·y², or sums of 1, y and y²."""

    constant: Any = None  # [R, B, J]
    linear: Any = None  # [R, B, J, P·D]
    square: Any = None  # [R, B, J, P·D]


class Softmax(NamedTuple):
    """c = exp(b − most) / total, and the mean that the gradient of softmax needs."""

    most: Any  # [R, B, I]; None where all logits are equal
    total: Any  # [R, B, I]; [I] where all logits are equal
    mean: Any = None  # [R, B, I], Σ c g over the edges of a child; None if b has no gradient


class Pass(NamedTuple):
    """Everything that one pass over the edges reads, except for the edges."""

    inputs: Inputs
    logits: Quadratic  # k, p, q
    softmax: Softmax
    gradients: Quadratic  # of N, S, Q; none in the forward
    size: Sizes


class Orders(NamedTuple):
    """The edges of a graph in three orders."""

    by_child: SortedEdges
    by_parent: SortedEdges
    by_kind: SortedEdges

    @classmethod
    def of(cls, edges: Sequence[Tensor]) -> Orders:
        """From `TritonEdges.tensors`."""
        return cls(*(SortedEdges(*edges[4 * n : 4 * n + 4]) for n in range(3)))


class Block(NamedTuple):
    """The samples of a program, inside a kernel; int64, because offsets may exceed 2³¹."""

    sample: Any  # [BLOCK_B]
    there: Any  # [BLOCK_B], whether the sample exists
    sample_of_row: Any  # [BLOCK_B·BLOCK_P]
    row: Any  # [BLOCK_B·BLOCK_P], 0 to BLOCK_P − 1
    row_there: Any  # [BLOCK_B·BLOCK_P]


class Edge(NamedTuple):
    """An edge for a block of samples, inside a kernel, with the offsets of its ends' features."""

    block: Block
    child: Any
    parent: Any
    kind: Any
    at_child: Any  # [BLOCK_B], in [B, I]
    at_parent: Any  # [BLOCK_B], in [B, J]
    at_pose: Any  # [BLOCK_B·BLOCK_P, BLOCK_D], in [B, J, P·D]
    pose_there: Any
