"""The memory layout of the CPU kernels in which the lanes of a vector hold one pose's numbers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from graphcaps.kernels.cpu.parts import TERMS, Array, Parts, Passes, Sums, Totals

LANE = 16  # numbers in a vector
SAMPLES = 8  # processed in turn for each group, whose matrices then stay in cache


class Scratch(NamedTuple):
    """Work space of a thread, flat."""

    x: Array  # pose of a child, expanded (see pose_steps.py) and padded with zeros
    y: Array  # votes of a group
    c: Array  # their coupling
    a: Array  # activations of their children
    rows: Array  # see steps.py
    g: Array  # gradients of coupling or logits
    dx: Array  # gradient of the expanded pose; zeros
    dy: Array  # gradients of as many votes as a partial sum has terms


class PosesInLanes(Parts):
    """Each vote is padded to whole vectors; any set of edges may compete.

    Args:
        u, weight, edges, parents, rows: as of `Parts`.
    """

    def __init__(
        self, u: Tensor, weight: Tensor, edges: Sequence[Tensor], parents: int, rows: int
    ) -> None:
        self.width = self.lanes_of(rows * weight.shape[2])
        self.lanes_as_type = (0,) * (self.width // LANE)
        super().__init__(
            u,
            weight,
            edges,
            parents,
            rows,
            terms_of_an_edge=len(u),
            vote=len(u) * self.width,
            cost=16,
        )
        self._spread_weight = self._spread(self.weight)

    @staticmethod
    def lanes_of(pose: int) -> int:
        """`pose` rounded up to whole vectors."""
        return math.ceil(pose / LANE) * LANE

    @property
    def passes(self) -> Passes:
        """See `Parts.passes`."""
        from graphcaps.kernels.cpu import pose_passes

        return Passes(
            pose_passes.couple_pass,
            pose_passes.couple_gradient_pass,
            pose_passes.dynamic_gradient_pass,
        )

    @property
    def matrices(self) -> Array:
        """See `Parts.matrices`."""
        return self._spread_weight

    def in_lanes(self, x: Array) -> Array:
        """`[B, J, d]` to `[B, J, width]`, flat, with zeros beyond d; `[B, J]` as it is."""
        if x.ndim == 2 or x.shape[2] == self.width:
            return x.reshape(-1)
        lanes = self.zeros(*x.shape[:2], self.width)
        lanes[..., : x.shape[2]] = x
        return lanes.reshape(-1)

    def scratch(self, *, gradients: bool = False, iterations: int | None = None) -> Scratch:
        """See `Parts.scratch`."""
        edges = math.ceil(max(1, self.facts.most) / LANE) * LANE
        pose = self.sizes.child_dim * self.width
        terms = max(TERMS, math.isqrt(edges)) + 1
        rounds = iterations or 1
        return Scratch(
            x=self.zeros(pose),
            y=self.empty(edges * self.width),
            c=self.empty(rounds * edges),
            a=self.empty(edges),
            rows=self.empty(4 * LANE),
            g=self.empty(gradients * rounds * edges),
            dx=self.zeros(gradients * pose),
            dy=self.empty(gradients * terms * self.width),
        )

    def zero_totals(self, wanted: Sequence[bool]) -> Totals:
        """See `Parts.zero_totals`."""
        return self._zeros_of_parents(wanted, self.sizes.samples)

    def zero_sums(self, wanted: Sequence[bool]) -> Sums:
        """See `Parts.zero_sums`."""
        samples = min(SAMPLES, self.sizes.samples)
        sums = self._zeros_of_parents(wanted, samples)
        return Sums(*sums, np.zeros(self.sizes.parents, np.int32))

    def add_up(self, totals: Sequence[Totals], wanted: Sequence[bool]) -> list[Array]:
        """See `Parts.add_up`."""
        nodes = self.sizes.samples, self.sizes.parents
        dims = ((1, 1), (self.width, self.pose), (self.width, self.pose))
        return [
            np.ascontiguousarray(sum(threads[1:], start=threads[0]).reshape(*nodes, width)[..., :d])
            if w
            else self.empty(0)
            for threads, (width, d), w in zip(zip(*totals, strict=True), dims, wanted, strict=True)
        ]

    def new_gradient(self, size: int) -> Array:
        """See `Parts.new_gradient`; the passes add to it."""
        return self.zeros(size)

    def gather_matrices(self, private: Sequence[Array]) -> Array:
        """See `Parts.gather_matrices`; also sums over the rows of a pose."""
        dweight = self.add_matrices(private)
        kinds, child_dim, parent_dim = self.weight.shape
        if dweight.size == 0 or parent_dim == self.width:
            return dweight
        by_row = dweight.reshape(kinds, child_dim, self.width)[..., : self.pose]
        return by_row.reshape(kinds, child_dim, self.sizes.rows, parent_dim).sum(axis=2).reshape(-1)

    def _spread(self, weight: Array) -> Array:
        """`[M, K, D]` to `[M, K, width]`, flat: each matrix repeated for every row of a pose."""
        kinds, child_dim, parent_dim = weight.shape
        if parent_dim == self.width:
            return weight.reshape(-1)
        spread = self.zeros(kinds, child_dim, self.width)
        for row in range(self.sizes.rows):
            spread[..., row * parent_dim : (row + 1) * parent_dim] = weight
        return spread.reshape(-1)

    def _zeros_of_parents(self, wanted: Sequence[bool], samples: int) -> Totals:
        count = samples * self.sizes.parents
        dims = (1, self.width, self.width)
        return Totals(*(self.zeros(count * d * w) for d, w in zip(dims, wanted, strict=True)))
