"""Samples side by side in lanes, and children parted among threads."""

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.kernels.edges import SortedEdges, sort_edges

Array = NDArray[Any]
LANES = (16, 32, 48, 64)  # each is compiled apart, when it is first wanted
WORK_OF_A_THREAD = 8_000_000  # multiplications of one pass for the votes; less is not worth one
FEW_THREADS = 4  # may have sums of their own for the parents, however many parents there are
TERMS = 32  # of a sum, at least, that are added apart; the square root of all, if that is more
LINE = 64  # bytes, of a cache


class Edges(NamedTuple):
    """What routing on the CPU needs of a graph, whatever the batch."""

    by_child: SortedEdges
    of_parent: Tensor  # [J], how many edges each parent has; int32
    of_kind: Tensor  # [M], how many edges have each matrix; int32
    facts: Tensor  # [2], the most edges of a child, and whether no matrix serves two; int32
    children: int
    parents: int
    kinds: int

    @property
    def tensors(self) -> list[Tensor]:
        """As the operations of torch take them."""
        edges = self.by_child
        return [edges.start, edges.parent, edges.kind, self.of_parent, self.of_kind, self.facts]


def prepare(graph: dgl.DGLGraph, kinds: int, device: torch.device) -> Edges:
    """Sort the edges of a graph by child, on the CPU or for the meta device.

    Args:
        graph: from `routing_graph`, `complete_graph` or `dgl.batch` of such.
        kinds: number of matrices, M.
        device: where the numbers are to be.
    """
    edges = sort_edges(graph, "child", kinds, torch.device("cpu"))
    parents = graph.num_nodes("parent")
    kind = edges.kind.long()
    owner = torch.zeros(kinds, dtype=torch.int32)
    owner[kind] = edges.child
    most = max([0, *edges.start.diff().tolist()])
    apart = bool((owner[kind] == edges.child).all())
    return Edges(
        by_child=SortedEdges(*(x.to(device) for x in edges)),
        of_parent=torch.bincount(edges.parent, minlength=parents).int().to(device),
        of_kind=torch.bincount(kind, minlength=kinds).int().to(device),
        facts=torch.tensor([most, apart], dtype=torch.int32, device=device),
        children=graph.num_nodes("child"),
        parents=parents,
        kinds=kinds,
    )


class Sizes(NamedTuple):
    """B, I, J, P, K and D."""

    samples: int
    children: int
    parents: int
    rows: int
    child_dim: int
    parent_dim: int


class EdgeArrays(NamedTuple):
    """Edges sorted by child, and how many terms of the sums of a parent or a matrix stand apart."""

    start: Array
    parent: Array
    kind: Array
    terms_of_parent: Array
    terms_of_kind: Array


class Sums(NamedTuple):
    """N, S and Q of a block of samples, or the gradients of k, p and q, as far as wanted."""

    N: Array
    S: Array
    Q: Array
    terms: Array  # how many each parent has


class Totals(NamedTuple):
    """The same, of all blocks."""

    N: Array
    S: Array
    Q: Array


class MatrixSums(NamedTuple):
    """Of the gradients of matrices that several children share; else empty."""

    weight: Array
    terms: Array  # how many each matrix has


class Parts:
    """The samples of a call side by side in lanes, its children in ranges, a thread for each.

    Args:
        u: poses, `[B, I, P·K]`.
        weight: matrices, `[M, K, D]`.
        edges: as `Edges.tensors` gives them.
        parents: J.
        rows: P.
    """

    def __init__(
        self, u: Tensor, weight: Tensor, edges: Sequence[Tensor], parents: int, rows: int
    ) -> None:
        start, parent, kind, of_parent, of_kind, facts = (x.numpy() for x in edges)
        self.u, self.weight = array(u), array(weight)
        self.dtype = self.u.dtype
        _, child_dim, parent_dim = weight.shape
        self.sizes = Sizes(len(u), u.shape[1], parents, rows, child_dim, parent_dim)
        self.pose = rows * parent_dim
        self.blocks = math.ceil(len(u) / LANES[-1])
        self.lanes = next(n for n in LANES if n * max(1, self.blocks) >= len(u))
        self.lanes_as_type = (0,) * (self.lanes // 16)
        self.edges = EdgeArrays(
            start.astype(np.int64),
            parent,
            kind,
            _terms_of_a_sum(of_parent),
            _terms_of_a_sum(of_kind * max(1, self.blocks)),
        )
        self.most, self.apart = max(1, int(facts[0])), bool(facts[1])
        work = self.blocks * self.lanes * len(kind) * rows * child_dim * parent_dim
        # private sums of parents take no more memory than poses, or are those of a few threads
        of_parents = self.blocks * self.lanes * parents * (2 * self.pose + 1)
        fitting = max(FEW_THREADS, self.u.size // max(1, of_parents))
        worth = min(torch.get_num_threads(), work // WORK_OF_A_THREAD, fitting)
        self.children = self.ranges(worth)
        self._threads: Executor | None = None

    def __enter__(self) -> Self:
        # threads of this call alone: kept ones would be missing in a forked process
        if len(self.children) > 1 and threading.main_thread().is_alive():  # none start after it
            self._threads = ThreadPoolExecutor(len(self.children) - 1)
        return self

    def __exit__(self, *error: object) -> None:
        if self._threads is not None:
            self._threads.shutdown()

    def run(self, one_pass: Callable, calls: Sequence[Sequence[Any]]) -> None:
        """Call a compiled function once for each range of children, all at the same time."""
        if self._threads is None:
            for call in calls:
                one_pass(*call)
            return
        others = [self._threads.submit(one_pass, *call) for call in calls[1:]]
        one_pass(*calls[0])
        for other in others:
            other.result()  # raises what its thread raised

    def ranges(self, count: int) -> list[tuple[int, int]]:
        """At most so many ranges of children, at least one, with equally many edges."""
        start, children = self.edges.start, self.sizes.children
        shares = np.linspace(0, start[-1], max(1, min(count, children)) + 1)[1:-1]
        bounds = [0, *np.searchsorted(start, shares).tolist(), children]
        return list(itertools.pairwise(bounds))

    def empty(self, *size: int) -> Array:
        """A new array in the dtype of the call."""
        return _aligned(np.empty, size, self.dtype)

    def zeros(self, *size: int) -> Array:
        """The same, of zeros."""
        return _aligned(np.zeros, size, self.dtype)

    def in_lanes(self, x: Array) -> Array:
        """`[B, J, d]` or `[B, J]` to `[blocks, J, d, lanes]`, flat; 0 where there is no sample."""
        from graphcaps.kernels.cpu.lanes import lay_in_lanes

        samples, nodes, d = *x.shape[:2], math.prod(x.shape[2:])
        lanes = self.empty(self.blocks * nodes * d * self.lanes)
        lay_in_lanes(x.reshape(-1), samples, nodes, d, lanes, self.lanes_as_type)
        return lanes

    def in_samples(self, x: Array, d: int) -> Array:
        """`[blocks, J, d, lanes]`, flat, to `[B, J, d]`."""
        from graphcaps.kernels.cpu.lanes import lay_in_samples

        samples, nodes = self.sizes.samples, self.sizes.parents
        out = self.empty(samples, nodes, d)
        lay_in_samples(x, samples, nodes, d, out.reshape(-1), self.lanes_as_type)
        return out

    def zero_totals(self, wanted: Sequence[bool], blocks: int) -> Totals:
        """Of a thread, for so many blocks; those that are not wanted are empty."""
        count = blocks * self.sizes.parents * self.lanes
        dims = (1, self.pose, self.pose)
        return Totals(*(self.zeros(count * d * w) for d, w in zip(dims, wanted, strict=True)))

    def zero_sums(self, wanted: Sequence[bool]) -> Sums:
        """Of a thread, for one block."""
        return Sums(*self.zero_totals(wanted, 1), np.zeros(self.sizes.parents, np.int32))

    def zero_matrix_sums(self, wanted: bool) -> MatrixSums:
        """Of a thread."""
        wanted = wanted and not self.apart
        return MatrixSums(
            self.zeros(self.weight.size * wanted), np.zeros(len(self.weight) * wanted, np.int32)
        )

    def private_matrices(self, wanted: bool) -> tuple[list[tuple[int, int]], list[Array]]:
        """Ranges of children, and the gradient of all matrices that each of them adds to.

        Where children share matrices, each range has its own, of which there are no more than take
        the memory of the poses: there are fewer ranges then.
        """
        if not wanted or self.apart:
            shared = self.zeros(self.weight.size * wanted)
            return self.children, [shared] * len(self.children)
        fitting = max(1, self.u.size // max(1, self.weight.size))
        ranges = self.ranges(min(len(self.children), fitting))
        return ranges, [self.zeros(self.weight.size) for _ in ranges]

    def add_matrices(self, private: Sequence[Array]) -> Array:
        """The gradients of all ranges added up."""
        if self.apart or len(private) == 1:
            return private[0]
        return sum(private[1:], start=private[0])

    def add_up(self, totals: Sequence[Totals], wanted: Sequence[bool]) -> list[Array]:
        """The totals of all threads, as `[B, J, d]`; empty where not wanted."""
        dims = (1, self.pose, self.pose)
        return [
            self.in_samples(sum(threads[1:], start=threads[0]), d) if w else self.empty(0)
            for threads, d, w in zip(zip(*totals, strict=True), dims, wanted, strict=True)
        ]


def array(x: Tensor) -> Array:
    """The numbers of a tensor, contiguous.

    By a second storage of the same memory: the one that `numpy()` is asked of can no more be
    resized, and FSDP resizes those of parameters.
    """
    return torch.from_dlpack(x.detach().contiguous().resolve_neg()).numpy()


def optional_array(x: Tensor | None) -> Array | None:
    """The numbers of a tensor, contiguous; None for None."""
    return None if x is None else array(x)


def _aligned(make: Callable, size: Sequence[int], dtype: np.dtype) -> Array:
    """A new array that starts with a line of the cache, so that no vector lies across two."""
    count = math.prod(size) * dtype.itemsize
    memory = make(count + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + count].view(dtype).reshape(size)


def _terms_of_a_sum(count: Array) -> Array:
    return np.maximum(TERMS, np.sqrt(count)).astype(np.int32)
