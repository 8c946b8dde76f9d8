"""What the kernels are given, in bundles: a Triton kernel takes a NamedTuple as it takes a tensor.

None in a bundle is known when the kernel is compiled: a term that is absent costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from graphcaps.kernels.edges import SortedEdges
from graphcaps.kernels.triton.device import blocks, power_of_two, release, tl

TILE = 1024  # numbers of a block of votes
LARGEST_TILE = 8192  # where poses are long; more does not fit in the shared memory of every GPU


class Sizes(NamedTuple):
    """Numbers known when a kernel is compiled.

    A tile of votes is [BLOCK_B·BLOCK_P, BLOCK_D]: the rows of matrix poses stand among the samples,
    so that û = Wᵀu is one product of matrices for all of them.
    """

    K: Any
    D: Any
    P: Any  # rows of a matrix pose; 1 for vectors
    R: Any  # iterations whose gradients are taken at once
    BLOCK_B: Any  # samples of a program
    BLOCK_P: Any
    BLOCK_K: Any
    BLOCK_D: Any

    @property
    def options(self) -> dict[str, int]:
        """How a kernel of these sizes is compiled."""
        pose = self.BLOCK_P.value * self.BLOCK_D.value
        return dict(
            num_warps=min(8, max(2, self.BLOCK_B.value * pose // 256)),
            # loading ahead takes shared memory for the features of parents in every iteration
            num_stages=3 if pose <= 64 and self.R.value <= 4 else 1,
        )

    @property
    def options_of_sums(self) -> dict[str, int]:
        """The same for kernels that keep sums of poses or matrices, which take more registers."""
        warps = min(8, 2 * self.options["num_warps"])
        # otherwise ptxas may move some numbers to the stack, to have more programs at once
        return self.options | dict(num_warps=warps, maxnreg=255)


def sizes(batch: int, K: int, D: int, P: int = 1) -> Sizes:
    """Blocks that fit in registers and shared memory.

    Args:
        batch: B.
        K, D, P: numbers of a row of a child's pose, of a parent's, and rows.

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
    # more than so many numbers of W fill shared memory
    BLOCK_K = max(terms, min(power_of_two(K), 32, 2048 // BLOCK_D))
    numbers = K, D, P, 1, BLOCK_B, BLOCK_P, BLOCK_K, BLOCK_D
    return Sizes(*map(tl.constexpr, numbers))


def fewest_terms() -> int:
    """Of a product of matrices in float32, by Triton's release."""
    return 8 if release() >= (3, 8) else 16


class Inputs(NamedTuple):
    """Features and sizes of a pass; R iterations of what differs between them."""

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
    """Coefficients of parents in constant + linear·y + square·y²; or sums of 1, y and y²."""

    constant: Any = None  # [R, B, J]
    linear: Any = None  # [R, B, J, P·D]
    square: Any = None  # [R, B, J, P·D]


class Softmax(NamedTuple):
    """c = exp(b − most) / total, and what the softmax's gradient needs."""

    most: Any  # [R, B, I]; None where all logits are equal
    total: Any  # [R, B, I]; [I] where all logits are equal
    mean: Any = None  # [R, B, I], Σ c g over the edges of a child; None if b has no gradient


class Pass(NamedTuple):
    """All that one pass over the edges reads, apart from the edges."""

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
    """The samples of a program, inside a kernel; int64, because an offset may pass 2³¹."""

    sample: Any  # [BLOCK_B]
    there: Any  # [BLOCK_B], whether the sample exists
    sample_of_row: Any  # [BLOCK_B·BLOCK_P]
    row: Any  # [BLOCK_B·BLOCK_P], 0 to BLOCK_P − 1
    row_there: Any  # [BLOCK_B·BLOCK_P]


class Edge(NamedTuple):
    """An edge for a block of samples, inside a kernel, and where the features of its ends stand."""

    block: Block
    child: Any
    parent: Any
    kind: Any
    at_child: Any  # [BLOCK_B], in [B, I]
    at_parent: Any  # [BLOCK_B], in [B, J]
    at_pose: Any  # [BLOCK_B·BLOCK_P, BLOCK_D], in [B, J, P·D]
    pose_there: Any
