"""The data of a call on the CPU: sorted edges, ranges of edges for threads, and partial sums."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.graph import competition_of_edges
from graphcaps.kernels.cpu.threads import run
from graphcaps.kernels.edges import SortedEdges, sort_edges

Array = NDArray[Any]
WORK_OF_A_THREAD = 8_000_000  # multiplications for votes in one pass that are worth a thread
FEW_THREADS = 4  # may have private sums, however many parents and matrices there are
TERMS = 32  # the least length of a partial sum; it is the square root of all terms, if that is more
LINE = 64  # bytes of a cache line
_compiled: set[tuple[Callable, np.dtype, tuple[int, ...]]] = set()


class Edges(NamedTuple):
    """The edges of a graph as the CPU kernels take them; they do not depend on the batch."""

    by_competition: SortedEdges  # edges that compete are contiguous, and sorted by child
    cuts: Tensor  # indices at which competitions can be split without splitting a child; int32
    of_parent: Tensor  # [J], number of edges of each parent; int32
    of_kind: Tensor  # [M], number of edges of each matrix; int32
    facts: Tensor  # [3], see `Facts`; int32
    children: int
    parents: int
    kinds: int

    @property
    def tensors(self) -> list[Tensor]:
        """The list that the custom operations take."""
        return [*self.by_competition, self.cuts, self.of_parent, self.of_kind, self.facts]


class Facts(NamedTuple):
    """Properties of the edges."""

    most: int  # the largest number of edges that compete with each other
    apart: int  # whether no two children share a matrix
    by_child: int  # whether the edges of each child compete


def prepare(graph: dgl.DGLGraph, kinds: int, device: torch.device) -> Edges:
    """Sort the edges of a graph by competition.

    Args:
        graph: from `routing_graph`, `complete_graph` or `dgl.batch` of such.
        kinds: number of matrices, M.
        device: the device of the result, the CPU or meta.
    """
    competition, count = competition_of_edges(graph)
    by_child = competition is None
    edges = sort_edges(graph, "child", kinds, torch.device("cpu"))
    cuts = torch.arange(len(edges.start), dtype=torch.int32)
    if competition is not None:
        edges, cuts = _sort_by_competition(graph, competition, count)
    kind = edges.kind.long()
    owner = torch.zeros(kinds, dtype=torch.int32)
    owner[kind] = edges.child
    facts = Facts(
        most=int(edges.start.diff().max()) if len(edges.start) > 1 else 0,
        apart=bool((owner[kind] == edges.child).all()),
        by_child=by_child,
    )
    return Edges(
        by_competition=SortedEdges(*(x.to(device) for x in edges)),
        cuts=cuts.to(device),
        of_parent=torch.bincount(edges.parent, minlength=graph.num_nodes("parent"))
        .int()
        .to(device),
        of_kind=torch.bincount(kind, minlength=kinds).int().to(device),
        facts=torch.tensor(facts, dtype=torch.int32, device=device),
        children=graph.num_nodes("child"),
        parents=graph.num_nodes("parent"),
        kinds=kinds,
    )


def _sort_by_competition(
    graph: dgl.DGLGraph, competition: Tensor, count: int
) -> tuple[SortedEdges, Tensor]:
    """Sort competitions by first child, and the edges of each by child; also return the cuts."""
    child, parent = (ends.long() for ends in graph.edges())
    first = torch.zeros(count, dtype=torch.int64)
    first = first.scatter_reduce(0, competition, child, "amin", include_self=False)
    order = first.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(count)
    competition, first = place[competition], first[order]
    by_place = (competition * graph.num_nodes("child") + child).argsort(stable=True)
    start = torch.zeros(count + 1, dtype=torch.int64)
    start[1:] = torch.bincount(competition, minlength=count).cumsum(0)
    last = torch.zeros_like(first).scatter_reduce(0, competition, child, "amax", include_self=False)
    whole = last.cummax(0).values[:-1] < first[1:]  # no child has edges on both sides of the cut
    inner = whole.nonzero().flatten() + 1
    cuts = torch.cat([torch.tensor([0]), inner, torch.tensor([count])])
    numbers = (start, *(x[by_place] for x in (child, parent, graph.edata["weight_index"])))
    return SortedEdges(*(x.int() for x in numbers)), cuts.int()


class Sizes(NamedTuple):
    """B, I, J, P, K and D."""

    samples: int
    children: int
    parents: int
    rows: int
    child_dim: int
    parent_dim: int


class EdgeArrays(NamedTuple):
    """Sorted edges, and the length of the partial sums of each parent and each matrix."""

    start: Array
    child: Array
    parent: Array
    kind: Array
    terms_of_parent: Array
    terms_of_kind: Array  # empty if no two children share a matrix


class Inputs(NamedTuple):
    """Inputs of the passes, with features of parents in lanes; absent ones are empty."""

    a: Array
    r: Array
    k: Array
    p: Array
    q: Array
    beta: Array
    prior: Array


class Needed(NamedTuple):
    """Whether the gradient of each input is needed."""

    u: bool
    weight: bool
    a: bool
    k: bool
    p: bool
    q: bool
    beta: bool
    prior: bool


class Outputs(NamedTuple):
    """Gradients of everything but the features of parents; those that are not needed are empty."""

    u: Array
    weight: Array
    a: Array
    beta: Array  # float64, as is the next, because the sums are long
    prior: Array


class Sums(NamedTuple):
    """Partial sums N, S and Q of a few samples, or gradients of k, p and q; empty if not wanted."""

    N: Array
    S: Array
    Q: Array
    terms: Array  # number of terms in the sums of each parent


class Totals(NamedTuple):
    """The sums of all samples."""

    N: Array
    S: Array
    Q: Array


class MatrixSums(NamedTuple):
    """Partial sums of the gradients of matrices; empty if no two children share a matrix."""

    weight: Array
    terms: Array  # number of terms in the sum of each matrix


class Passes(NamedTuple):
    """The compiled loops over a range of competitions."""

    couple: Callable
    couple_gradient: Callable
    dynamic_gradient: Callable


class Parts(ABC):
    """Poses, matrices and edges of a call, whose competitions are divided into ranges for threads.

    A subclass defines the memory layout: samples in lanes, or the numbers of a pose in lanes.
    Features of parents are `[B, J, d]` or `[B, J]` here, and have the layout of the subclass in
    `Inputs`, `Sums` and `Totals`.

    Args:
        u: poses, `[B, I, P·K]`.
        weight: matrices, `[M, K, D]`.
        edges: as `Edges.tensors` gives them.
        parents: J.
        rows: P.
        terms_of_an_edge: number of terms that an edge adds to the gradient of its matrix.
        vote: numbers in a vote, for all samples.
        cost: of a multiplication, relative to that with samples in lanes.

    Attributes:
        lanes_as_type: a tuple for whose length the passes are specialised.
    """

    lanes_as_type: tuple[int, ...]

    def __init__(
        self,
        u: Tensor,
        weight: Tensor,
        edges: Sequence[Tensor],
        parents: int,
        rows: int,
        *,
        terms_of_an_edge: int,
        vote: int,
        cost: int,
    ) -> None:
        start, child, parent, kind, cuts, of_parent, of_kind, facts = (x.numpy() for x in edges)
        self.u, self.weight = array(u), array(weight)
        self.dtype = self.u.dtype
        _, child_dim, parent_dim = weight.shape
        self.sizes = Sizes(len(u), u.shape[1], parents, rows, child_dim, parent_dim)
        self.pose = rows * parent_dim
        self.facts = Facts(*facts.tolist())
        if self.facts.apart:  # there are no partial sums of matrices
            of_kind = of_kind[:0]
        self.edges = EdgeArrays(
            start.astype(np.int64),
            child,
            parent,
            kind,
            _terms_of_a_sum(of_parent),
            _terms_of_a_sum(of_kind * terms_of_an_edge),
        )
        self.cuts = cuts
        work = cost * vote * len(kind) * child_dim
        # private sums of parents may take as much memory as the poses, or be those of a few threads
        fitting = max(FEW_THREADS, self.u.size // max(1, 2 * vote * parents))
        worth = min(torch.get_num_threads(), work // WORK_OF_A_THREAD, fitting)
        self.groups = self.ranges(worth)

    @property
    @abstractmethod
    def passes(self) -> Passes:
        """The compiled functions, imported on first use because they need numba."""

    @property
    @abstractmethod
    def matrices(self) -> Array:
        """The matrices as the passes take them, flat."""

    @abstractmethod
    def in_lanes(self, x: Array) -> Array:
        """Convert features of parents, `[B, J, d]` or `[B, J]`, to the layout of the passes."""

    @abstractmethod
    def scratch(self, *, gradients: bool = False, iterations: int | None = None) -> Any:
        """Work space of a thread, for one pass, or for the last pass over all iterations."""

    @abstractmethod
    def zero_totals(self, wanted: Sequence[bool]) -> Totals:
        """Totals of a thread, for all samples; those that are not wanted are empty."""

    @abstractmethod
    def zero_sums(self, wanted: Sequence[bool]) -> Sums:
        """Partial sums of a thread, for the samples that are processed at a time."""

    @abstractmethod
    def add_up(self, totals: Sequence[Totals], wanted: Sequence[bool]) -> list[Array]:
        """Sum the totals of all threads, as `[B, J, d]`; empty where not wanted."""

    @abstractmethod
    def new_gradient(self, size: int) -> Array:
        """An array for the gradient of poses or activations."""

    @abstractmethod
    def gather_matrices(self, private: Sequence[Array]) -> Array:
        """Sum the gradients of matrices over all ranges, `[M, K, D]`, flat; empty if not wanted."""

    def couple_pass(self, inputs: Inputs, leak: bool, wanted: Sequence[bool]) -> list[Array]:
        """N `[B, J, 1]`, S and Q `[B, J, P·D]`; those that are not wanted are empty."""
        totals = [self.zero_totals(wanted) for _ in self.groups]
        calls = [
            (
                self.u.reshape(-1),
                self.matrices,
                inputs,
                self.edges,
                groups,
                self.sizes,
                leak,
                self.lanes_as_type,
                self.scratch(),
                self.zero_sums(wanted),
                own,
            )
            for groups, own in zip(self.groups, totals, strict=True)
        ]
        self.run(self.passes.couple, calls)
        return self.add_up(totals, wanted)

    def couple_gradient_pass(
        self, inputs: Inputs, leak: bool, detach_coupling: bool, of_sums: Totals, needed: Needed
    ) -> tuple[Array, ...]:
        """The gradients of the inputs that are needed, from `of_sums`, those of N, S and Q."""
        wanted = needed.k, needed.p or needed.q, needed.q  # Q comes with S
        groups, dweights = self.private_matrices(needed.weight)
        totals = [self.zero_totals(wanted) for _ in groups]
        samples, nodes = self.sizes[:2]
        du = self.new_gradient(self.u.size * needed.u)
        da = self.new_gradient(samples * nodes * needed.a)
        of_kinds = [self.zeros_of_kinds(needed) for _ in groups]
        calls = [
            (
                self.u.reshape(-1),
                self.matrices,
                inputs,
                self.edges,
                groups[t],
                self.sizes,
                leak,
                detach_coupling,
                of_sums,
                self.lanes_as_type,
                self.scratch(gradients=True),
                self.zero_sums(wanted),
                totals[t],
                self.zero_matrix_sums(needed.weight),
                Outputs(du, dweights[t], da, *of_kinds[t]),
            )
            for t in range(len(groups))
        ]
        self.run(self.passes.couple_gradient, calls)
        dk, dp, dq = self.add_up(totals, (needed.k, needed.p, needed.q))
        dbeta, dprior = (sum(x).astype(self.dtype) for x in zip(*of_kinds, strict=True))
        return du, self.gather_matrices(dweights), da, dk, dp, dq, dbeta, dprior

    def dynamic_gradient_pass(
        self, V: Sequence[Array], q: Sequence[Array], iterations: int, needed: Sequence[bool]
    ) -> tuple[Array, Array]:
        """The gradients of u and weight, empty where not needed; see `dynamic.py`."""
        of_u, of_weight = needed
        groups, dweights = self.private_matrices(of_weight)
        du = self.new_gradient(self.u.size * of_u)
        of_all_V = np.concatenate([self.empty(0), *V])
        of_all_q = np.concatenate(q)
        calls = [
            (
                self.u.reshape(-1),
                self.matrices,
                self.edges,
                those,
                self.sizes,
                of_all_V,
                of_all_q,
                iterations,
                self.lanes_as_type,
                self.scratch(gradients=True, iterations=iterations),
                self.zero_matrix_sums(of_weight),
                du,
                dweight,
            )
            for those, dweight in zip(groups, dweights, strict=True)
        ]
        self.run(self.passes.dynamic_gradient, calls)
        return du, self.gather_matrices(dweights)

    def inputs(
        self,
        a: Array | None = None,
        r: Array | None = None,
        k: Array | None = None,
        p: Array | None = None,
        q: Array | None = None,
        beta: Array | None = None,
        prior: Array | None = None,
    ) -> Inputs:
        """Inputs from activations `[B, I]`, features of parents, and numbers of matrices `[M]`."""
        return Inputs(
            self.empty(0) if a is None else a.reshape(-1),
            *(self.empty(0) if x is None else self.in_lanes(x) for x in (r, k, p, q)),
            *(self.empty(0) if x is None else x for x in (beta, prior)),
        )

    def run(self, one_pass: Callable, calls: Sequence[Sequence[Any]]) -> None:
        """Call a compiled function for all ranges in parallel; the first time one by one.

        The first call compiles, for which someone may wait until they press Ctrl-C.
        """
        signature = one_pass, self.dtype, self.lanes_as_type
        if signature in _compiled:
            run(one_pass, calls)
            return
        for arguments in calls:
            one_pass(*arguments)
        _compiled.add(signature)

    def ranges(self, count: int) -> list[tuple[int, int]]:
        """Divide the competitions into 1 to `count` ranges with about equally many edges."""
        start, cuts = self.edges.start, self.cuts
        count = max(1, min(count, len(cuts) - 1))
        shares = [start[-1] * n / count for n in range(1, count)]
        bounds = [0, *cuts[np.searchsorted(start[cuts], shares)].tolist(), int(cuts[-1])]
        return list(itertools.pairwise(bounds))

    def empty(self, *size: int) -> Array:
        """An uninitialised array in the dtype of the call."""
        return _aligned(np.empty, size, self.dtype)

    def zeros(self, *size: int) -> Array:
        """An array of zeros in the dtype of the call."""
        return _aligned(np.zeros, size, self.dtype)

    def zeros_of_kinds(self, needed: Needed) -> tuple[Array, Array]:
        """Zeros for a thread's gradients of beta and prior."""
        kinds = len(self.weight)
        return np.zeros(kinds * needed.beta), np.zeros(kinds * needed.prior)

    def zero_matrix_sums(self, wanted: bool) -> MatrixSums:
        """Partial sums of a thread for all matrices."""
        wanted = wanted and not self.facts.apart
        sums = self.zeros(self.matrices.size * wanted)
        return MatrixSums(sums, np.zeros(len(self.weight) * wanted, np.int32))

    def private_matrices(self, wanted: bool) -> tuple[list[tuple[int, int]], list[Array]]:
        """Ranges of competitions, and for each of them the gradient of all matrices to add to.

        If children share matrices, each range has a private gradient. All private gradients may
        take as much memory as the poses, or be those of a few threads; this limits the number of
        ranges.
        """
        size = self.matrices.size
        if not wanted or self.facts.apart:
            shared = self.zeros(size * wanted)
            return self.groups, [shared] * len(self.groups)
        fitting = max(FEW_THREADS, self.u.size // max(1, size))
        ranges = self.groups if fitting >= len(self.groups) else self.ranges(fitting)
        return ranges, [self.zeros(size) for _ in ranges]

    def add_matrices(self, private: Sequence[Array]) -> Array:
        """Sum the gradients of all ranges."""
        if self.facts.apart or len(private) == 1:
            return private[0]
        return sum(private[1:], start=private[0])


def array(x: Tensor) -> Array:
    """A contiguous numpy array of a tensor.

    It is taken from a second storage that shares the memory: a storage cannot be resized after
    `numpy()` was called on it, and FSDP resizes the storages of parameters.
    """
    return torch.from_dlpack(x.detach().contiguous().resolve_neg()).numpy()


def optional_array(x: Tensor | None) -> Array | None:
    """`array(x)`, or None for None."""
    return None if x is None else array(x)


def _aligned(make: Callable, size: Sequence[int], dtype: np.dtype) -> Array:
    """A new array that starts at a cache line, so that no vector spans two lines."""
    count = math.prod(size)
    if count == 0:  # most are: what is absent
        return np.empty(size, dtype)
    memory = make(count + LINE // dtype.itemsize, dtype)
    first = -memory.__array_interface__["data"][0] % LINE // dtype.itemsize
    aligned = memory[first : first + count]
    return aligned if len(size) == 1 else aligned.reshape(size)


def _terms_of_a_sum(count: Array) -> Array:
    return np.maximum(TERMS, np.sqrt(count)).astype(np.int32)
