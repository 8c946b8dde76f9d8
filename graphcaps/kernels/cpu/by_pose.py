"""The numbers of a pose side by side in lanes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from graphcaps.kernels.cpu.parts import (
    TERMS,
    Array,
    Inputs,
    Needed,
    Outputs,
    Parts,
    Sums,
    Totals,
)

LANE = 16  # numbers of a vector
SAMPLES = 8  # that pass through a group one after the other


class Scratch(NamedTuple):
    """What a thread works in, flat."""

    x: Array  # the pose of a child, spread; 0 beyond its numbers
    y: Array  # the votes of a group, one after the other
    c: Array  # their coupling
    a: Array  # activations of their children
    rows: Array  # see steps.py
    g: Array  # gradients of coupling or logits
    dx: Array  # of the pose, spread; zeros
    dy: Array  # of so many votes as a sum has terms


class PosesInLanes(Parts):
    """Votes stand one after the other, each in whole rows of lanes; any edges compete.

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
        self.spread_weight = self._spread(self.weight)

    @staticmethod
    def lanes_of(pose: int) -> int:
        """How many lanes so many numbers take, in whole vectors."""
        return math.ceil(pose / LANE) * LANE

    def in_lanes(self, x: Array) -> Array:
        """`[B, J, d]` to `[B, J, width]`, flat, with zeros beyond d; `[B, J]` as it is."""
        if x.ndim == 2 or x.shape[2] == self.width:
            return x.reshape(-1)
        lanes = self.zeros(*x.shape[:2], self.width)
        lanes[..., : x.shape[2]] = x
        return lanes.reshape(-1)

    def couple_pass(self, inputs: Inputs, leak: bool, wanted: Sequence[bool]) -> list[Array]:
        """See `Parts.couple_pass`."""
        from graphcaps.kernels.cpu import pose_passes

        totals = [self._zero_totals(wanted, self.sizes.samples) for _ in self.groups]
        calls = [
            (
                self.u.reshape(-1),
                self.spread_weight,
                inputs,
                self.edges,
                groups,
                self.sizes,
                leak,
                self.lanes_as_type,
                self._scratch(),
                self._zero_sums(wanted),
                own,
            )
            for groups, own in zip(self.groups, totals, strict=True)
        ]
        self.run(pose_passes.couple_pass, calls)
        return self._add_up(totals, wanted)

    def couple_gradient_pass(
        self, inputs: Inputs, leak: bool, detach_coupling: bool, of_sums: Totals, needed: Needed
    ) -> tuple[Array, ...]:
        """See `Parts.couple_gradient_pass`."""
        from graphcaps.kernels.cpu import pose_passes

        wanted = needed.k, needed.p or needed.q, needed.q  # Q comes with S
        groups, dweights = self.private_matrices(needed.weight, self.spread_weight.size)
        totals = [self._zero_totals(wanted, self.sizes.samples) for _ in groups]
        samples, nodes = self.sizes[:2]
        du = self.zeros(self.u.size * needed.u)
        da = self.zeros(samples * nodes * needed.a)
        of_kinds = [self.zeros_of_kinds(needed) for _ in groups]
        calls = [
            (
                self.u.reshape(-1),
                self.spread_weight,
                inputs,
                self.edges,
                groups[t],
                self.sizes,
                leak,
                detach_coupling,
                of_sums,
                self.lanes_as_type,
                self._scratch(gradients=True),
                self._zero_sums(wanted),
                totals[t],
                self.zero_matrix_sums(needed.weight, self.spread_weight.size),
                Outputs(du, dweights[t], da, *of_kinds[t]),
            )
            for t in range(len(groups))
        ]
        self.run(pose_passes.couple_gradient_pass, calls)
        dk, dp, dq = self._add_up(totals, (needed.k, needed.p, needed.q))
        dbeta, dprior = (sum(x).astype(self.dtype) for x in zip(*of_kinds, strict=True))
        return du, self._gather(dweights, needed.weight), da, dk, dp, dq, dbeta, dprior

    def dynamic_gradient_pass(
        self, V: Sequence[Array], q: Sequence[Array], iterations: int, needed: Sequence[bool]
    ) -> tuple[Array, Array]:
        """See `Parts.dynamic_gradient_pass`."""
        from graphcaps.kernels.cpu import pose_passes

        of_u, of_weight = needed
        groups, dweights = self.private_matrices(of_weight, self.spread_weight.size)
        du = self.zeros(self.u.size * of_u)
        of_all_V = np.concatenate([self.empty(0), *V])
        of_all_q = np.concatenate(q)
        calls = [
            (
                self.u.reshape(-1),
                self.spread_weight,
                self.edges,
                those,
                self.sizes,
                of_all_V,
                of_all_q,
                iterations,
                self.lanes_as_type,
                self._scratch(gradients=True, iterations=iterations),
                self.zero_matrix_sums(of_weight, self.spread_weight.size),
                du,
                dweight,
            )
            for those, dweight in zip(groups, dweights, strict=True)
        ]
        self.run(pose_passes.dynamic_gradient_pass, calls)
        return du, self._gather(dweights, of_weight)

    def _spread(self, weight: Array) -> Array:
        """`[M, K, D]` to `[M, K, width]`, flat: each matrix once for every row of a pose."""
        kinds, child_dim, parent_dim = weight.shape
        if parent_dim == self.width:
            return weight.reshape(-1)
        spread = self.zeros(kinds, child_dim, self.width)
        for row in range(self.sizes.rows):
            spread[..., row * parent_dim : (row + 1) * parent_dim] = weight
        return spread.reshape(-1)

    def _gather(self, dweights: Sequence[Array], needed: bool) -> Array:
        """The gradients of all ranges and all rows of a pose added up, `[M, K, D]`, flat."""
        dweight = self.add_matrices(dweights)
        kinds, child_dim, parent_dim = self.weight.shape
        if not needed or parent_dim == self.width:
            return dweight
        by_row = dweight.reshape(kinds, child_dim, self.width)[..., : self.pose]
        return by_row.reshape(kinds, child_dim, self.sizes.rows, parent_dim).sum(axis=2).reshape(-1)

    def _scratch(self, gradients: bool = False, iterations: int = 1) -> Scratch:
        edges = math.ceil(max(1, self.facts.most) / LANE) * LANE
        pose = self.sizes.child_dim * self.width
        terms = max(TERMS, math.isqrt(edges)) + 1
        return Scratch(
            x=self.zeros(pose),
            y=self.empty(edges * self.width),
            c=self.empty(iterations * edges),
            a=self.empty(edges),
            rows=self.empty(4 * LANE),
            g=self.empty(gradients * iterations * edges),
            dx=self.zeros(gradients * pose),
            dy=self.empty(gradients * terms * self.width),
        )

    def _zero_totals(self, wanted: Sequence[bool], samples: int) -> Totals:
        """Of a thread, for so many samples; those that are not wanted are empty."""
        count = samples * self.sizes.parents
        dims = (1, self.width, self.width)
        return Totals(*(self.zeros(count * d * w) for d, w in zip(dims, wanted, strict=True)))

    def _zero_sums(self, wanted: Sequence[bool]) -> Sums:
        """Of a thread, for as many samples as are taken at a time."""
        samples = min(SAMPLES, self.sizes.samples)
        return Sums(*self._zero_totals(wanted, samples), np.zeros(self.sizes.parents, np.int32))

    def _add_up(self, totals: Sequence[Totals], wanted: Sequence[bool]) -> list[Array]:
        """The totals of all threads, as `[B, J, d]`; empty where not wanted."""
        nodes = self.sizes.samples, self.sizes.parents
        dims = ((1, 1), (self.width, self.pose), (self.width, self.pose))
        return [
            np.ascontiguousarray(sum(threads[1:], start=threads[0]).reshape(*nodes, width)[..., :d])
            if w
            else self.empty(0)
            for threads, (width, d), w in zip(zip(*totals, strict=True), dims, wanted, strict=True)
        ]
