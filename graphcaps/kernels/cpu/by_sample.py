"""Samples side by side in lanes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from graphcaps.kernels.cpu.parts import Array, Inputs, Needed, Outputs, Parts, Sums, Totals

LANES = (16, 32, 48, 64)  # each is compiled apart, when it is first wanted


class Scratch(NamedTuple):
    """What a thread works in, flat."""

    x: Array  # the pose of a child
    y: Array  # its votes
    c: Array  # its coupling
    rows: Array  # see steps.py


class GradientScratch(NamedTuple):
    """The same, for gradients."""

    x: Array
    y: Array
    c: Array
    rows: Array
    g: Array  # gradients of coupling or logits
    dx: Array  # of the pose, twice
    dy: Array  # of votes


class SamplesInLanes(Parts):
    """Up to 64 samples stand side by side; the edges of each child compete.

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
        """How many lanes so many samples take, in equal blocks, those without one included."""
        blocks = max(1, math.ceil(samples / LANES[-1]))
        return blocks * next(n for n in LANES if n * blocks >= samples)

    def in_lanes(self, x: Array) -> Array:
        """`[B, J, d]` or `[B, J]` to `[blocks, J, d, lanes]`, flat; 0 where there is no sample."""
        from graphcaps.kernels.cpu.lanes import lay_in_lanes

        samples, nodes, d = *x.shape[:2], math.prod(x.shape[2:])
        lanes = self.empty(self.blocks * nodes * d * self.lanes)
        lay_in_lanes(x.reshape(-1), samples, nodes, d, lanes, self.lanes_as_type)
        return lanes

    def couple_pass(self, inputs: Inputs, leak: bool, wanted: Sequence[bool]) -> list[Array]:
        """See `Parts.couple_pass`."""
        from graphcaps.kernels.cpu import couple_passes

        totals = [self._zero_totals(wanted, self.blocks) for _ in self.groups]
        calls = [
            (
                self.u.reshape(-1),
                self.weight.reshape(-1),
                inputs,
                self.edges,
                children,
                self.sizes,
                leak,
                self.lanes_as_type,
                self._scratch(),
                self._zero_sums(wanted),
                own,
            )
            for children, own in zip(self.groups, totals, strict=True)
        ]
        self.run(couple_passes.couple_pass, calls)
        return self._add_up(totals, wanted)

    def couple_gradient_pass(
        self, inputs: Inputs, leak: bool, detach_coupling: bool, of_sums: Totals, needed: Needed
    ) -> tuple[Array, ...]:
        """See `Parts.couple_gradient_pass`."""
        from graphcaps.kernels.cpu import couple_passes

        wanted = needed.k, needed.p or needed.q, needed.q  # Q comes with S
        children, dweights = self.private_matrices(needed.weight, self.weight.size)
        totals = [self._zero_totals(wanted, self.blocks) for _ in children]
        samples, nodes = self.sizes[:2]
        du = self.empty(self.u.size * needed.u)
        da = self.empty(samples * nodes * needed.a)
        of_kinds = [self.zeros_of_kinds(needed) for _ in children]
        calls = [
            (
                self.u.reshape(-1),
                self.weight.reshape(-1),
                inputs,
                self.edges,
                children[t],
                self.sizes,
                leak,
                detach_coupling,
                of_sums,
                self.lanes_as_type,
                self._gradient_scratch(edges_at_once=1),
                self._zero_sums(wanted),
                totals[t],
                self.zero_matrix_sums(needed.weight, self.weight.size),
                Outputs(du, dweights[t], da, *of_kinds[t]),
            )
            for t in range(len(children))
        ]
        self.run(couple_passes.couple_gradient_pass, calls)
        dk, dp, dq = self._add_up(totals, (needed.k, needed.p, needed.q))
        dbeta, dprior = (sum(x).astype(self.dtype) for x in zip(*of_kinds, strict=True))
        return du, self.add_matrices(dweights), da, dk, dp, dq, dbeta, dprior

    def dynamic_gradient_pass(
        self, V: Sequence[Array], q: Sequence[Array], iterations: int, needed: Sequence[bool]
    ) -> tuple[Array, Array]:
        """See `Parts.dynamic_gradient_pass`."""
        from graphcaps.kernels.cpu.dynamic_passes import dynamic_gradient_pass

        of_u, of_weight = needed
        children, dweights = self.private_matrices(of_weight, self.weight.size)
        du = self.empty(self.u.size * of_u)
        of_all_V = np.concatenate([self.empty(0), *V])
        of_all_q = np.concatenate(q)
        calls = [
            (
                self.u.reshape(-1),
                self.weight.reshape(-1),
                self.edges,
                those,
                self.sizes,
                of_all_V,
                of_all_q,
                iterations,
                self.lanes_as_type,
                self._gradient_scratch(edges_at_once=self._most),
                self.zero_matrix_sums(of_weight, self.weight.size),
                du,
                dweight,
            )
            for those, dweight in zip(children, dweights, strict=True)
        ]
        self.run(dynamic_gradient_pass, calls)
        return du, self.add_matrices(dweights)

    @property
    def _most(self) -> int:
        return max(1, self.facts.most)

    def _scratch(self) -> Scratch:
        return Scratch(
            x=self.empty(self.u.shape[2] * self.lanes),
            y=self.empty(self._most * self.pose * self.lanes),
            c=self.empty(self._most * self.lanes),
            rows=self.empty(4 * self.lanes),
        )

    def _gradient_scratch(self, edges_at_once: int) -> GradientScratch:
        return GradientScratch(
            *self._scratch(),
            g=self.empty(self._most * self.lanes),
            dx=self.empty(2 * self.u.shape[2] * self.lanes),
            dy=self.empty(edges_at_once * self.pose * self.lanes),
        )

    def _zero_totals(self, wanted: Sequence[bool], blocks: int) -> Totals:
        """Of a thread, for so many blocks; those that are not wanted are empty."""
        count = blocks * self.sizes.parents * self.lanes
        dims = (1, self.pose, self.pose)
        return Totals(*(self.zeros(count * d * w) for d, w in zip(dims, wanted, strict=True)))

    def _zero_sums(self, wanted: Sequence[bool]) -> Sums:
        """Of a thread, for one block."""
        return Sums(*self._zero_totals(wanted, 1), np.zeros(self.sizes.parents, np.int32))

    def _add_up(self, totals: Sequence[Totals], wanted: Sequence[bool]) -> list[Array]:
        """The totals of all threads, as `[B, J, d]`; empty where not wanted."""
        dims = (1, self.pose, self.pose)
        return [
            self._in_samples(sum(threads[1:], start=threads[0]), d) if w else self.empty(0)
            for threads, d, w in zip(zip(*totals, strict=True), dims, wanted, strict=True)
        ]

    def _in_samples(self, x: Array, d: int) -> Array:
        """`[blocks, J, d, lanes]`, flat, to `[B, J, d]`."""
        from graphcaps.kernels.cpu.lanes import lay_in_samples

        samples, nodes = self.sizes.samples, self.sizes.parents
        out = self.empty(samples, nodes, d)
        lay_in_samples(x, samples, nodes, d, out.reshape(-1), self.lanes_as_type)
        return out
