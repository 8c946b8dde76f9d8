"""The memory layout of the CPU kernels in which each lane of a vector holds one sample."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from graphcaps.kernels.cpu.parts import Array, Parts, Passes, Sums, Totals

LANES = (16, 32, 48, 64)  # the passes are compiled for each when it is first used


class Scratch(NamedTuple):
    """Work space of a thread, flat."""

    x: Array  # the pose of a child
    y: Array  # its votes; in the last pass over all iterations one at a time
    c: Array  # its coupling, of all iterations in that pass
    rows: Array  # see steps.py


class GradientScratch(NamedTuple):
    """Work space of a thread for gradients, flat."""

    x: Array
    y: Array
    c: Array
    rows: Array
    g: Array  # gradients of coupling or logits
    dx: Array  # gradient of the pose, and a partial sum of it
    dy: Array  # gradient of a vote


class SamplesInLanes(Parts):
    """A block of up to 64 samples is processed at once; only edges of one child may compete.

    Args:
        u, weight, edges, parents, rows: as of `Parts`.
    """

    def __init__(
        self, u: Tensor, weight: Tensor, edges: Sequence[Tensor], parents: int, rows: int
    ) -> None:
        self.blocks = math.ceil(len(u) / LANES[-1])
        self.lanes = self.lanes_of(len(u)) // max(1, self.blocks)
        self.lanes_as_type = (0,) * (self.lanes // 16)
        super().__init__(
            u,
            weight,
            edges,
            parents,
            rows,
            terms_of_an_edge=max(1, self.blocks),
            vote=self.blocks * self.lanes * rows * weight.shape[2],
            cost=1,
        )

    @staticmethod
    def lanes_of(samples: int) -> int:
        """The number of lanes in equal blocks for `samples`, lanes without a sample included."""
        blocks = max(1, math.ceil(samples / LANES[-1]))
        return blocks * next(n for n in LANES if n * blocks >= samples)

    @property
    def passes(self) -> Passes:
        """See `Parts.passes`."""
        from graphcaps.kernels.cpu import couple_passes, dynamic_passes

        return Passes(
            couple_passes.couple_pass,
            couple_passes.couple_gradient_pass,
            dynamic_passes.dynamic_gradient_pass,
        )

    @property
    def matrices(self) -> Array:
        """See `Parts.matrices`."""
        return self.weight.reshape(-1)

    def in_lanes(self, x: Array) -> Array:
        """`[B, J, d]` or `[B, J]` to `[blocks, J, d, lanes]`, flat; 0 where there is no sample."""
        from graphcaps.kernels.cpu.lanes import lay_in_lanes

        samples, nodes, d = *x.shape[:2], math.prod(x.shape[2:])
        lanes = self.empty(self.blocks * nodes * d * self.lanes)
        lay_in_lanes(x.reshape(-1), samples, nodes, d, lanes, self.lanes_as_type)
        return lanes

    def scratch(
        self, *, gradients: bool = False, iterations: int | None = None
    ) -> Scratch | GradientScratch:
        """See `Parts.scratch`."""
        most, pose = max(1, self.facts.most), self.u.shape[2]
        votes, rounds = (most, 1) if iterations is None else (1, iterations)
        of_pass = Scratch(
            x=self.empty(pose * self.lanes),
            y=self.empty(votes * self.pose * self.lanes),
            c=self.empty(rounds * most * self.lanes),
            rows=self.empty(4 * self.lanes),
        )
        if not gradients:
            return of_pass
        return GradientScratch(
            *of_pass,
            g=self.empty(rounds * most * self.lanes),
            dx=self.empty(2 * pose * self.lanes),
            dy=self.empty(self.pose * self.lanes),
        )

    def zero_totals(self, wanted: Sequence[bool]) -> Totals:
        """See `Parts.zero_totals`."""
        return self._zeros_of_parents(wanted, self.blocks)

    def zero_sums(self, wanted: Sequence[bool]) -> Sums:
        """See `Parts.zero_sums`; for one block."""
        return Sums(*self._zeros_of_parents(wanted, 1), np.zeros(self.sizes.parents, np.int32))

    def add_up(self, totals: Sequence[Totals], wanted: Sequence[bool]) -> list[Array]:
        """See `Parts.add_up`."""
        dims = (1, self.pose, self.pose)
        return [
            self._in_samples(sum(threads[1:], start=threads[0]), d) if w else self.empty(0)
            for threads, d, w in zip(zip(*totals, strict=True), dims, wanted, strict=True)
        ]

    def new_gradient(self, size: int) -> Array:
        """See `Parts.new_gradient`; the passes write every number once."""
        return self.empty(size)

    def gather_matrices(self, private: Sequence[Array]) -> Array:
        """See `Parts.gather_matrices`."""
        return self.add_matrices(private)

    def _zeros_of_parents(self, wanted: Sequence[bool], blocks: int) -> Totals:
        count = blocks * self.sizes.parents * self.lanes
        dims = (1, self.pose, self.pose)
        return Totals(*(self.zeros(count * d * w) for d, w in zip(dims, wanted, strict=True)))

    def _in_samples(self, x: Array, d: int) -> Array:
        """`[blocks, J, d, lanes]`, flat, to `[B, J, d]`."""
        from graphcaps.kernels.cpu.lanes import lay_in_samples

        samples, nodes = self.sizes.samples, self.sizes.parents
        out = self.empty(samples, nodes, d)
        lay_in_samples(x, samples, nodes, d, out.reshape(-1), self.lanes_as_type)
        return out
