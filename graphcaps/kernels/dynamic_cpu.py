"""Poses, matrices and sorted edges enter, routed capsules leave, and their gradients: on the CPU.

The derivation is in README.md beside this file, the loops are in passes.py. Here the samples are
laid side by side, the children are parted among threads, and what is left for dense tensors, the
squash of the parents, is computed.
"""

import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.kernels.edges import SortedEdges, sort_edges

Array = NDArray[Any]
DTYPES = (torch.float32, torch.float64)
LANES = (16, 32, 48, 64)  # each is compiled apart, when it is first wanted
WORK_OF_A_THREAD = 8_000_000  # multiplications of one pass for the votes; less is not worth one


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why the compiled loops cannot run on `device`, or None where they can."""
    if device.type != "cpu":
        return f"it is for the CPU, not for {device.type}"
    try:
        import graphcaps.kernels.passes  # noqa: F401
    except ImportError as error:
        return f"it is compiled by numba, which cannot be imported ({error}); pip install numba"
    return None


class Edges(NamedTuple):
    """What routing on the CPU needs of a graph, whatever the batch."""

    by_child: SortedEdges
    children: int
    parents: int
    kinds: int
    most: int  # edges of one child
    apart: bool  # no matrix serves two children


def prepare(graph: dgl.DGLGraph, kinds: int) -> Edges:
    """Sort the edges of a graph by child.

    Args:
        graph: from `routing_graph`, `complete_graph` or `dgl.batch` of such.
        kinds: number of matrices, M.
    """
    edges = sort_edges(graph, "child", kinds, torch.device("cpu"))
    owner = torch.zeros(kinds, dtype=torch.int32)
    owner[edges.kind.long()] = edges.child
    return Edges(
        by_child=edges,
        children=graph.num_nodes("child"),
        parents=graph.num_nodes("parent"),
        kinds=kinds,
        most=max([1, *edges.start.diff().tolist()]),
        apart=bool((owner[edges.kind.long()] == edges.child).all()),
    )


class DynamicRouting(torch.autograd.Function):
    """Dynamic routing from u `[B, I, K]` and weight `[M, K, D]` to v `[B, J, D]`.

    All of it in numpy: torch's own threads keep a core busy for a while after they have worked, and
    the next pass would have to share it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        edges: Edges,
        iterations: int,
        gradients: Literal["all", "last"],
    ) -> Tensor:
        """`s^r_j = Σ c^r_e û_e` with `c^r = softmax(û · V_{r-1})`, and `V_r = V_{r-1} + v^r`."""
        from graphcaps.kernels.passes import sum_votes

        with _Parts(weight, edges, batch=len(u)) as parts:
            in_lanes = parts.in_lanes(_array(u))
            V, s = parts.zeros_of_parents(), []
            for r in range(iterations):
                s.append(parts.sum(sum_votes, in_lanes, parts.in_lanes(V), r == 0))
                v = _squash(s[r])
                V = V + v
        ctx.save_for_backward(torch.from_numpy(in_lanes), weight, torch.from_numpy(np.stack(s)))
        ctx.edges, ctx.gradients = edges, gradients
        return torch.from_numpy(v)

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
        """`q^r = (∂squash/∂s)ᵀ (∂v^r + H_r)` and `H_{r-1} = H_r + Σ l^r_e û_e`, from the last r."""
        from graphcaps.kernels.passes import sum_logit_gradients

        if torch.is_grad_enabled():  # create_graph=True; once_differentiable may say nothing
            raise RuntimeError(
                "engine 'fused' has first derivatives alone; use engine='scatter' for the second"
            )
        kept_u, weight, kept_s = ctx.saved_tensors
        u, s = kept_u.numpy(), kept_s.numpy()
        through_all = ctx.gradients == "all"
        last = len(s) - 1
        with _Parts(weight, ctx.edges, batch=len(dv)) as parts:
            V = [parts.in_lanes(V) for V in itertools.accumulate(map(_squash, s))]
            H = parts.zeros_of_parents()
            q = [parts.in_lanes(H)] * len(s)
            for r in range(last, -1 if through_all else last - 1, -1):
                q[r] = parts.in_lanes(_squash_gradient(s[r], _array(dv) if r == last else H))
                if through_all and r > 0:
                    H = H + parts.sum(sum_logit_gradients, u, V[r - 1], q[r])
            du, dweight = parts.gradients(
                u, np.stack(V), np.stack(q), through_all, ctx.needs_input_grad
            )
        return du, dweight, None, None, None


class _Parts:
    """The samples side by side in lanes, the children in as many parts as threads are worth it."""

    def __init__(self, weight: Tensor, edges: Edges, batch: int) -> None:
        self.weight, self.edges, self.batch = _array(weight), edges, batch
        self.dtype = self.weight.dtype
        blocks = max(1, math.ceil(batch / LANES[-1]))
        self.lanes = next(lanes for lanes in LANES if lanes * blocks >= batch)
        _, child_dim, self.parent_dim = weight.shape
        work = blocks * self.lanes * len(edges.by_child.kind) * child_dim * self.parent_dim
        count = min(torch.get_num_threads(), edges.children, work // WORK_OF_A_THREAD)
        self.children = self._ranges(count)
        self.scratch = [
            (
                self._empty(2, edges.most, self.parent_dim, self.lanes),
                self._empty(2, edges.most, self.lanes),
                self._empty(2, self.lanes),
                self._empty(edges.parents, self.parent_dim, self.lanes),
                self._empty(2, child_dim, self.lanes),
            )
            for _ in self.children
        ]
        self.threads: Executor | None = None

    def __enter__(self) -> "_Parts":
        # threads of this call alone: kept ones would be missing in a forked process
        if len(self.children) > 1 and threading.main_thread().is_alive():  # none start after it
            self.threads = ThreadPoolExecutor(len(self.children) - 1)
        return self

    def __exit__(self, *error: object) -> None:
        if self.threads is not None:
            self.threads.shutdown()

    def zeros_of_parents(self) -> Array:
        """A feature of parents, `[B, J, D]`."""
        return np.zeros((self.batch, self.edges.parents, self.parent_dim), self.dtype)

    def in_lanes(self, x: Array) -> Array:
        """`[B, n, d]` to `[blocks, n, d, lanes]`, with zeros in the lanes without a sample."""
        from graphcaps.kernels.passes import lay_in_lanes

        lanes = self._empty(math.ceil(self.batch / self.lanes), *x.shape[1:], self.lanes)
        lay_in_lanes(x, lanes)
        return lanes

    def sum(self, one_pass: Callable, u: Array, *features: Any) -> Array:
        """What one pass over all edges sums into the parents, `[B, J, D]`."""
        from graphcaps.kernels.passes import lay_in_samples

        size = (len(self.children), len(u), self.edges.parents, self.parent_dim, self.lanes)
        sums = np.zeros(size, self.dtype)
        self._run(one_pass, self.children, u, features, [(x,) for x in sums])
        samples = self._empty(self.batch, *size[2:4])
        lay_in_samples(sums.sum(axis=0), samples)
        return samples

    def gradients(
        self, u: Array, V: Array, q: Array, through_all: bool, needed: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of u and weight, as far as they are needed."""
        from graphcaps.kernels.passes import add_gradients

        children, copies = self.children, 1
        if not self.edges.apart:  # private sums, and no more of them than u takes memory
            copies = min(len(children), max(1, u.size // self.weight.size))
            children = self._ranges(copies)
        du = self._empty(*((self.batch, *u.shape[1:3]) if needed[0] else (0, 0, 0)))
        dweight = np.zeros((copies, *(self.weight.shape if needed[1] else (0, 0, 0))), self.dtype)
        outputs = [(du, dweight[min(part, copies - 1)]) for part in range(len(children))]
        rounds = (0 if through_all else len(q) - 1, len(q))
        self._run(add_gradients, children, u, (V, q, rounds, through_all), outputs)
        total = dweight[0] if copies == 1 else dweight.sum(axis=0)
        return (
            torch.from_numpy(du) if needed[0] else None,
            torch.from_numpy(total) if needed[1] else None,
        )

    def _empty(self, *size: int) -> Array:
        return np.empty(size, self.dtype)

    def _ranges(self, count: int) -> list[tuple[int, int]]:
        """So many ranges of children, at least one, with equally many edges."""
        start = self.edges.by_child.start.numpy()
        shares = np.linspace(0, start[-1], max(1, count) + 1)[1:-1]
        bounds = [0, *np.searchsorted(start, shares).tolist(), self.edges.children]
        return list(itertools.pairwise(bounds))

    def _run(
        self,
        one_pass: Callable,
        ranges: Sequence[tuple[int, int]],
        u: Array,
        features: Sequence[Any],
        outputs: Sequence[Any],
    ) -> None:
        """Walk over the edges, each range of children in a thread of its own."""
        edges = self.edges.by_child
        sorted_edges = edges.start.numpy(), edges.parent.numpy(), edges.kind.numpy()
        lanes = (0,) * (self.lanes // 16)  # by its length: a type, so that loops have known ends
        calls = [
            (u, self.weight, sorted_edges, children, *features, lanes, scratch, *output)
            for children, scratch, output in zip(ranges, self.scratch, outputs, strict=False)
        ]
        if self.threads is None:
            for call in calls:
                one_pass(*call)
            return
        others = [self.threads.submit(one_pass, *call) for call in calls[1:]]
        one_pass(*calls[0])
        for other in others:
            other.result()  # raises what its thread raised


def _array(x: Tensor) -> Array:
    return x.detach().contiguous().numpy()


@np.errstate(over="ignore", invalid="ignore")
def _squash(s: Array) -> Array:
    """`s |s| / (1 + |s|²)`."""
    square = np.square(s).sum(axis=-1, keepdims=True)
    return s * (np.sqrt(square) / (1 + square))


@np.errstate(over="ignore", invalid="ignore")
def _squash_gradient(s: Array, dv: Array) -> Array:
    """`(∂squash/∂s)ᵀ ∂v`; 0 where s is."""
    square = np.square(s).sum(axis=-1, keepdims=True)
    norm = np.sqrt(square)
    unit = s / np.where(norm > 0, norm, 1)
    along = (unit * dv).sum(axis=-1, keepdims=True)
    scale = norm / (1 + square)
    return scale * (dv + (1 - square) / (1 + square) * along * unit)
