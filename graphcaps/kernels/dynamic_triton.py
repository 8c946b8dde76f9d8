"""Poses and matrices enter, routed capsules leave, on CUDA: no vote is ever in global memory."""

# Kernels take pointers and sizes by position, without types; V is the letter of the design.
# ruff: noqa: RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

from __future__ import annotations  # tl.constexpr is not there without triton

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.graph import is_complete
from graphcaps.kernels.edges import SortedEdges, sort_edges

try:
    import triton
    import triton.language as tl
except ImportError:  # then nothing below is launched: why_not says so
    triton = None


def _kernel(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


DTYPES = (torch.float32, torch.bfloat16)
OLDEST_TRITON = (3, 6)  # of those that were tried
WIDEST_TILE = 320  # J·D of a complete graph: the votes of more parents do not fit in registers
LONGEST_POSE = 32  # K, likewise
MOST_TILES = 64  # of children, whose partial sums are kept
PROGRAMS = 512  # that keep a GPU busy; where a graph gives fewer, its sums are cut into parts
EDGES_OF_PART = 64  # at least, of the edges of a parent


@dataclass(frozen=True)
class TritonEdges:
    """What the kernels need to know of a graph, on the device where they run.

    Attributes:
        by_child, by_parent, by_kind: the edges in three orders.
        log_degree: ln of each child's number of parents, the log-sum-exp of equal logits,
            float32 `[I]`.
        children, parents, kinds: I, J, M.
        complete: whether the graph is `complete_graph`'s, each edge with a matrix of its own.

    >>> from graphcaps import complete_graph
    >>> edges = TritonEdges.of(complete_graph(6, 3), kinds=18, device=torch.device("cpu"))
    >>> edges.complete, edges.by_parent.start.tolist()
    (True, [0, 6, 12, 18])
    """

    by_child: SortedEdges
    by_parent: SortedEdges
    by_kind: SortedEdges
    log_degree: Tensor
    children: int
    parents: int
    kinds: int
    complete: bool

    @classmethod
    def of(cls, graph: dgl.DGLGraph, kinds: int, device: torch.device) -> TritonEdges:
        """Sort the edges of a graph; to be done once, not at each forward.

        Args:
            graph: from `routing_graph`, `complete_graph` or `dgl.batch` of such.
            kinds: number of matrices, M.
            device: where the kernels will run.
        """
        by_child = sort_edges(graph, "child", kinds, device)
        return cls(
            by_child=by_child,
            by_parent=sort_edges(graph, "parent", kinds, device),
            by_kind=sort_edges(graph, "kind", kinds, device),
            log_degree=by_child.start.diff().float().log(),
            children=graph.num_nodes("child"),
            parents=graph.num_nodes("parent"),
            kinds=kinds,
            complete=is_complete(graph) and graph.num_edges() == kinds,
        )


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None if they can.

    >>> why_not(torch.device("meta")) is None
    False
    """
    if triton is None:
        return "triton is not installed"
    if _release() < OLDEST_TRITON:
        return f"it needs Triton 3.6, and this is {triton.__version__}"
    interpreted = not isinstance(_dot, triton.JITFunction)  # TRITON_INTERPRET=1, for tests
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"Triton's kernels run on CUDA, not on {device.type}"
    return None if interpreted else _why_not_launched()


@functools.cache
def _why_not_launched() -> str | None:
    try:
        triton.runtime.driver.active.utils  # noqa: B018, it compiles what launches kernels
    except Exception as error:
        return f"Triton needs a CUDA device and a C compiler, and says: {error}"
    return None


def routed(
    u: Tensor,
    weight: Tensor,
    edges: TritonEdges,
    iterations: int = 3,
    gradients: Literal["all", "last"] = "all",
) -> Tensor:
    """What `kernels.routed` does after it has looked at the arguments; raises RuntimeError.

    Sums are in float32 and in a fixed order: equal calls give equal bits.
    """
    if reason := why_not(u.device):
        raise RuntimeError(reason)
    return _Routed.apply(u, weight, edges, iterations, gradients == "all")


class _Routed(torch.autograd.Function):
    """Keeps u, W, and of every iteration s and V, and on the general path the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, edges: TritonEdges, iterations: int, through_all: bool
    ) -> Tensor:
        u, weight = u.contiguous(), weight.contiguous()
        passes = _passes(u, weight, edges, iterations)
        size = (iterations, len(u), edges.parents, weight.shape[2])
        s = u.new_empty(size, dtype=torch.float32)
        earlier = u.new_zeros(size, dtype=torch.float32)  # V, the sum of the v before
        v = u.new_empty(size[1:])
        with torch.cuda.device_of(u):
            for r in range(iterations):
                partial = passes.weighted_votes(r, earlier[r])
                last = r == iterations - 1
                _squash_sums(partial, s[r], earlier[r], None if last else earlier[r + 1], v)
        ctx.save_for_backward(u, weight, s, earlier, passes.lse)
        ctx.edges, ctx.through_all = edges, through_all
        return v

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "engine 'fused' has first derivatives alone; use engine='scatter' for the second"
            )
        u, weight, s, earlier, lse = ctx.saved_tensors
        iterations = len(s)
        passes = _passes(u, weight, ctx.edges, iterations, lse)
        q = torch.empty_like(s)  # the gradient of s
        flowing = torch.zeros_like(s[0])  # H, the gradient of V
        with torch.cuda.device_of(u):
            _differentiate_squash(gradient.contiguous(), None, s[-1], q[-1], None)
            for r in reversed(range(1, iterations) if ctx.through_all else ()):
                partial = passes.weighted_gradients(r, earlier[r], q[r])
                _differentiate_squash(flowing, partial, s[r - 1], q[r - 1], flowing)
            du, dweight = passes.gradients(earlier, q, ctx.through_all, ctx.needs_input_grad)
        return du, dweight, None, None, None


class _AnyGraph:
    """Two passes over the edges per iteration: child by child, then parent by parent."""

    def __init__(
        self,
        u: Tensor,
        weight: Tensor,
        edges: TritonEdges,
        iterations: int,
        lse: Tensor | None = None,
    ) -> None:
        self.u, self.weight, self.edges = u, weight, edges
        batch, children, child_dim = u.shape
        size = (iterations, batch, children)
        self.lse = u.new_empty(size, dtype=torch.float32) if lse is None else lse
        self.mean = u.new_zeros(size if lse is not None else (), dtype=torch.float32)  # Σ c a
        block_d = max(16, _power_of_two(weight.shape[2]))
        block_n = max(16, min(_power_of_two(batch), 1024 // block_d))
        self.image_blocks = _blocks(batch, block_n)
        self.counts = (batch, children, edges.parents)
        self.sizes = dict(
            child_dim=child_dim,
            parent_dim=weight.shape[2],
            block_n=block_n,
            # more than so many numbers of W fill shared memory
            block_k=max(_fewest_terms(), min(_power_of_two(child_dim), 32, 2048 // block_d)),
            block_d=block_d,
            # loading ahead takes shared memory for every iteration's V and q
            num_stages=3 if block_d <= 64 and iterations <= 4 else 1,
            num_warps=2 if block_n * block_d <= 1024 else 4,
        )

    def weighted_votes(self, r: int, earlier: Tensor) -> Tensor:
        """Partial sums of c·û, `[parts, B, J, D]`."""
        if r == 0:
            self.lse[0] = self.edges.log_degree
        else:
            _launch(
                _log_sum_exp_of_children,
                (self.edges.children, self.image_blocks),
                *self._by("child"),
                *(earlier, self.lse[r], *self.counts),
                **self.sizes,
            )
        return self._sums_into_parents(r, earlier, None)

    def weighted_gradients(self, r: int, earlier: Tensor, q: Tensor) -> Tensor:
        """Partial sums of l·û, `[parts, B, J, D]`."""
        _launch(
            _mean_gradient_of_children,
            (self.edges.children, self.image_blocks),
            *self._by("child"),
            *(earlier, q, self.lse[r], self.mean[r], *self.counts),
            **self.sizes,
        )
        return self._sums_into_parents(r, earlier, q)

    def gradients(
        self, earlier: Tensor, q: Tensor, through_logits: bool, needed: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of u and W, as far as they are needed."""
        u, weight, kinds = self.u, self.weight, max(1, self.edges.kinds)
        first = 0 if through_logits else len(q) - 1
        mean = self.mean if through_logits else self.lse  # not read, then
        shared = (
            *(earlier[first:], q[first:], q[0].numel()),
            *(self.lse[first:], mean[first:], mean[0].numel(), *self.counts),
        )
        how = dict(rounds=len(q) - first, through_logits=through_logits, **self.sizes)
        k_blocks = _blocks(u.shape[2], self.sizes["block_k"])
        du = dweight = None
        if needed[0]:
            du = torch.empty_like(u)
            grid = (self.edges.children, self.image_blocks, k_blocks)
            _launch(_gradient_of_poses, grid, *self._by("child"), *shared, du, **how)
        if needed[1]:
            work = _blocks(len(self.edges.by_kind.child), kinds) * self.image_blocks
            parts = max(1, min(_blocks(PROGRAMS, kinds), work))
            partial, size = _partial(weight, parts), weight.numel()
            grid = (self.edges.kinds, k_blocks, parts)
            by_kind = self._by("kind")
            _launch(_gradient_of_matrices, grid, *by_kind, *shared, partial, size, **how)
            dweight = _sum_of_parts(partial, weight)
        return du, dweight

    def _sums_into_parents(self, r: int, earlier: Tensor, q: Tensor | None) -> Tensor:
        parents = max(1, self.edges.parents)
        degree = _blocks(len(self.edges.by_parent.child), parents)
        # from the graph alone, so that an image is summed in the same order in every batch
        parts = max(1, min(_blocks(PROGRAMS, parents), _blocks(degree, EDGES_OF_PART)))
        partial = earlier.new_empty(parts, *earlier.shape)
        _launch(
            _sum_into_parents,
            (self.edges.parents, self.image_blocks, parts),
            *self._by("parent"),
            *(earlier, earlier if q is None else q, self.lse[r]),
            *(self.lse[r] if q is None else self.mean[r], *self.counts),
            *(partial, earlier.numel()),
            of_gradients=q is not None,
            **self.sizes,
        )
        return partial

    def _by(self, end: Literal["child", "parent", "kind"]) -> tuple[Tensor, ...]:
        """Poses, matrices, and the edges sorted by one end: its offsets, then the other two."""
        edges: SortedEdges = getattr(self.edges, f"by_{end}")
        others = (getattr(edges, name) for name in ("child", "parent", "kind") if name != end)
        return self.u, self.weight, edges.start, *others


class _CompleteGraph(_AnyGraph):
    """One pass per iteration: a program has a tile of children with all their parents."""

    def weighted_votes(self, r: int, earlier: Tensor) -> Tensor:
        """Partial sums of c·û, `[tiles, B, J, D]`."""
        return self._sums_of_tiles(r, earlier, None)

    def weighted_gradients(self, r: int, earlier: Tensor, q: Tensor) -> Tensor:
        """Partial sums of l·û, `[tiles, B, J, D]`."""
        return self._sums_of_tiles(r, earlier, q)

    def _sums_of_tiles(self, r: int, earlier: Tensor, q: Tensor | None) -> Tensor:
        batch, children, _ = self.counts
        sizes = self._sizes_of_tiles()
        # from the graph alone, so that an image is summed in the same order in every batch
        children_of_tile = max(8, _blocks(children, MOST_TILES))
        tiles = _blocks(children, children_of_tile)
        partial = earlier.new_empty(tiles, *earlier.shape)
        _launch(
            _sum_tile_into_parents,
            (tiles, _blocks(batch, sizes["block_n"])),
            *(self.u, self.weight, earlier, earlier if q is None else q),
            *(self.lse[r], self.lse[r] if q is None else self.mean[r], batch, children),
            *(children_of_tile, partial, earlier.numel()),
            of_gradients=q is not None,
            **sizes,
        )
        return partial

    def _sizes_of_tiles(self) -> dict[str, int]:
        parents, block_d = self.edges.parents, self.sizes["block_d"]
        return dict(
            parents=parents,
            child_dim=self.sizes["child_dim"],
            parent_dim=self.sizes["parent_dim"],
            block_n=32 if parents * block_d <= 160 else 16,
            # all of K at once
            block_k=max(_fewest_terms(), _power_of_two(self.sizes["child_dim"])),
            block_d=block_d,
            num_warps=4,
        )


def _passes(
    u: Tensor, weight: Tensor, edges: TritonEdges, iterations: int, lse: Tensor | None = None
) -> _AnyGraph:
    width = edges.parents * max(16, _power_of_two(weight.shape[2]))
    tiles = edges.complete and width <= WIDEST_TILE and u.shape[2] <= LONGEST_POSE
    return (_CompleteGraph if tiles else _AnyGraph)(u, weight, edges, iterations, lse)


def _squash_sums(
    partial: Tensor, s: Tensor, earlier: Tensor, later: Tensor | None, v: Tensor
) -> None:
    """s and its squash from partial sums; V of the next iteration, or v after the last."""
    parts, batch, parents, dim = partial.shape
    rows, block_d = batch * parents, _power_of_two(dim)
    block_rows = max(1, 512 // block_d)
    _launch(
        _squash_sums_kernel,
        (_blocks(rows, block_rows),),
        *(partial, parts, s, earlier, v if later is None else later, s.numel(), rows),
        dim=dim,
        add_earlier=later is not None,
        block_rows=block_rows,
        block_d=block_d,
        num_warps=4,
    )


def _differentiate_squash(
    gradient: Tensor, partial: Tensor | None, s: Tensor, q: Tensor, total: Tensor | None
) -> None:
    """q from the gradient of v and what partial sums add to it; the total is H, if asked for."""
    batch, parents, dim = s.shape
    rows, block_d = batch * parents, _power_of_two(dim)
    block_rows = max(1, 512 // block_d)
    _launch(
        _differentiate_squash_kernel,
        (_blocks(rows, block_rows),),
        *(
            gradient,
            gradient if partial is None else partial,
            0 if partial is None else len(partial),
        ),
        *(s, q, q if total is None else total, s.numel(), rows),
        dim=dim,
        keep_total=total is not None,
        block_rows=block_rows,
        block_d=block_d,
        num_warps=4,
    )


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    if all(grid):
        # multiplication and addition in one instruction: Triton's default has changed
        kernel[grid](*args, **constants, enable_fp_fusion=True)


def _partial(weight: Tensor, parts: int) -> Tensor:
    dtype = torch.float32 if parts > 1 else weight.dtype
    return weight.new_empty((parts, *weight.shape), dtype=dtype)


def _sum_of_parts(partial: Tensor, weight: Tensor) -> Tensor:
    return partial.sum(0).to(weight.dtype) if len(partial) > 1 else partial[0]


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _release() -> tuple[int, ...]:
    return tuple(map(int, triton.__version__.split(".")[:2]))


def _fewest_terms() -> int:
    """Of a dot product of matrices in float32, by Triton's release."""
    return 8 if _release() >= (3, 8) else 16


def _power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


# Kernels. Features of parents (V, q) are float32 [B, J, D], those of children [B, I]; a program
# has a block of images, `images`, int64 because an image's offset may pass 2³¹.


@_kernel
def _dot(a, b, total):
    """Products and sums in full float32, not in TensorFloat-32; bfloat16 is widened exactly."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


@_kernel
def _poses(
    u, images, child, batch, children, first_k, child_dim: tl.constexpr, block_k: tl.constexpr
):
    """u of one child, [images, K]."""
    k = first_k + tl.arange(0, block_k)
    offset = (images * children + child)[:, None] * child_dim + k
    return tl.load(u + offset, mask=(images < batch)[:, None] & (k < child_dim), other=0.0)


@_kernel
def _matrix(
    weight,
    kind,
    first_k,
    child_dim: tl.constexpr,
    parent_dim: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
):
    """W of one kind, [K, D]."""
    k, d = first_k + tl.arange(0, block_k), tl.arange(0, block_d)
    offset = (tl.cast(kind, tl.int64) * child_dim + k)[:, None] * parent_dim + d
    return tl.load(weight + offset, mask=(k < child_dim)[:, None] & (d < parent_dim), other=0.0)


@_kernel
def _votes(
    u,
    weight,
    images,
    child,
    kind,
    batch,
    children,
    child_dim: tl.constexpr,
    parent_dim: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
):
    """û of one edge, [images, D]."""
    u_hat = tl.zeros([block_n, block_d], tl.float32)
    for first_k in tl.static_range(0, child_dim, block_k):
        pose = _poses(u, images, child, batch, children, first_k, child_dim, block_k)
        matrix = _matrix(weight, kind, first_k, child_dim, parent_dim, block_k, block_d)
        u_hat = _dot(pose, matrix, u_hat)
    return u_hat


@_kernel
def _at_parent(
    feature, images, parent, batch, parents, parent_dim: tl.constexpr, block_d: tl.constexpr
):
    """V or q of one parent, [images, D]."""
    d = tl.arange(0, block_d)
    offset = (images * parents + parent)[:, None] * parent_dim + d
    return tl.load(feature + offset, mask=(images < batch)[:, None] & (d < parent_dim), other=0.0)


@_kernel
def _log_sum_exp_of_children(
    u,
    weight,
    start,
    parent_of,
    kind_of,
    earlier,
    lse,
    batch,
    children,
    parents,
    child_dim: tl.constexpr,
    parent_dim: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
):
    """ln Σ exp(û·V) over the edges of one child."""
    child = tl.program_id(0)
    images = tl.program_id(1).to(tl.int64) * block_n + tl.arange(0, block_n)
    most = tl.full([block_n], float("-inf"), tl.float32)
    total = tl.zeros([block_n], tl.float32)
    for e in range(tl.load(start + child), tl.load(start + child + 1)):
        parent, kind = tl.load(parent_of + e), tl.load(kind_of + e)
        u_hat = _votes(
            u,
            weight,
            images,
            child,
            kind,
            batch,
            children,
            child_dim,
            parent_dim,
            block_n,
            block_k,
            block_d,
        )
        V = _at_parent(earlier, images, parent, batch, parents, parent_dim, block_d)
        logit = tl.sum(u_hat * V, 1)
        higher = tl.maximum(most, logit)
        total = total * tl.exp(most - higher) + tl.exp(logit - higher)
        most = higher
    tl.store(lse + images * children + child, most + tl.log(total), mask=images < batch)


@_kernel
def _mean_gradient_of_children(
    u,
    weight,
    start,
    parent_of,
    kind_of,
    earlier,
    q,
    lse,
    mean,
    batch,
    children,
    parents,
    child_dim: tl.constexpr,
    parent_dim: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
):
    """Σ c a over the edges of one child, with a = û·q."""
    child = tl.program_id(0)
    images = tl.program_id(1).to(tl.int64) * block_n + tl.arange(0, block_n)
    at_child = images * children + child
    lse_here = tl.load(lse + at_child, mask=images < batch, other=0.0)
    total = tl.zeros([block_n], tl.float32)
    for e in range(tl.load(start + child), tl.load(start + child + 1)):
        parent, kind = tl.load(parent_of + e), tl.load(kind_of + e)
        u_hat = _votes(
            u,
            weight,
            images,
            child,
            kind,
            batch,
            children,
            child_dim,
            parent_dim,
            block_n,
            block_k,
            block_d,
        )
        V = _at_parent(earlier, images, parent, batch, parents, parent_dim, block_d)
        q_here = _at_parent(q, images, parent, batch, parents, parent_dim, block_d)
        total += _coupling(u_hat, V, lse_here) * tl.sum(u_hat * q_here, 1)
    tl.store(mean + at_child, total, mask=images < batch)


@_kernel
def _coupling(u_hat, V, lse):
    """c of one edge, [images]; rounding may lift a logit over the log-sum-exp."""
    return tl.exp(tl.minimum(tl.sum(u_hat * V, 1) - lse, 0.0))


@_kernel
def _sum_into_parents(
    u,
    weight,
    start,
    child_of,
    kind_of,
    earlier,
    q,
    lse,
    mean,
    batch,
    children,
    parents,
    partial,
    size_of_part,
    of_gradients: tl.constexpr,
    child_dim: tl.constexpr,
    parent_dim: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
):
    """Σ c û, or Σ l û with l = c (a − mean), over one part of the edges of one parent."""
    parent, part = tl.program_id(0), tl.program_id(2)
    images = tl.program_id(1).to(tl.int64) * block_n + tl.arange(0, block_n)
    V = _at_parent(earlier, images, parent, batch, parents, parent_dim, block_d)
    if of_gradients:
        q_here = _at_parent(q, images, parent, batch, parents, parent_dim, block_d)
    total = tl.zeros([block_n, block_d], tl.float32)
    first, stop = tl.load(start + parent), tl.load(start + parent + 1)
    edges_of_part = tl.cdiv(stop - first, tl.num_programs(2))
    first += part * edges_of_part
    for e in range(first, tl.minimum(first + edges_of_part, stop)):
        child, kind = tl.load(child_of + e), tl.load(kind_of + e)
        u_hat = _votes(
            u,
            weight,
            images,
            child,
            kind,
            batch,
            children,
            child_dim,
            parent_dim,
            block_n,
            block_k,
            block_d,
        )
        at_child = images * children + child
        lse_here = tl.load(lse + at_child, mask=images < batch, other=0.0)
        coefficient = _coupling(u_hat, V, lse_here)
        if of_gradients:
            mean_here = tl.load(mean + at_child, mask=images < batch, other=0.0)
            coefficient *= tl.sum(u_hat * q_here, 1) - mean_here
        total += coefficient[:, None] * u_hat
    d = tl.arange(0, block_d)
    offset = part.to(tl.int64) * size_of_part
    offset += (images * parents + parent)[:, None] * parent_dim + d
    tl.store(partial + offset, total, mask=(images < batch)[:, None] & (d < parent_dim))


@_kernel
def _gradient_of_votes(
    u,
    weight,
    images,
    child,
    parent,
    kind,
    earlier,
    q,
    size_at_parents,
    lse,
    mean,
    size_at_children,
    batch,
    children,
    parents,
    rounds: tl.constexpr,
    through_logits: tl.constexpr,
    child_dim: tl.constexpr,
    parent_dim: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
):
    """∂û = Σ_r (c q + l V) of one edge, [images, D]."""
    u_hat = _votes(
        u,
        weight,
        images,
        child,
        kind,
        batch,
        children,
        child_dim,
        parent_dim,
        block_n,
        block_k,
        block_d,
    )
    gradient = tl.zeros([block_n, block_d], tl.float32)
    at_child = images * children + child
    for _ in tl.static_range(rounds):
        V = _at_parent(earlier, images, parent, batch, parents, parent_dim, block_d)
        q_here = _at_parent(q, images, parent, batch, parents, parent_dim, block_d)
        lse_here = tl.load(lse + at_child, mask=images < batch, other=0.0)
        coupling = _coupling(u_hat, V, lse_here)
        gradient += coupling[:, None] * q_here
        if through_logits:
            mean_here = tl.load(mean + at_child, mask=images < batch, other=0.0)
            logit = coupling * (tl.sum(u_hat * q_here, 1) - mean_here)
            gradient += logit[:, None] * V
        earlier += size_at_parents
        q += size_at_parents
        lse += size_at_children
        mean += size_at_children
    return gradient


@_kernel
def _gradient_of_poses(
    u,
    weight,
    start,
    parent_of,
    kind_of,
    earlier,
    q,
    size_at_parents,
    lse,
    mean,
    size_at_children,
    batch,
    children,
    parents,
    du,
    rounds: tl.constexpr,
    through_logits: tl.constexpr,
    child_dim: tl.constexpr,
    parent_dim: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
):
    """∂u = Σ W ∂û over the edges of one child, for one block of K."""
    child, first_k = tl.program_id(0), tl.program_id(2) * block_k
    images = tl.program_id(1).to(tl.int64) * block_n + tl.arange(0, block_n)
    total = tl.zeros([block_n, block_k], tl.float32)
    for e in range(tl.load(start + child), tl.load(start + child + 1)):
        parent, kind = tl.load(parent_of + e), tl.load(kind_of + e)
        gradient = _gradient_of_votes(
            u,
            weight,
            images,
            child,
            parent,
            kind,
            earlier,
            q,
            size_at_parents,
            lse,
            mean,
            size_at_children,
            batch,
            children,
            parents,
            rounds,
            through_logits,
            child_dim,
            parent_dim,
            block_n,
            block_k,
            block_d,
        )
        matrix = _matrix(weight, kind, first_k, child_dim, parent_dim, block_k, block_d)
        total = _dot(gradient, tl.trans(matrix), total)
    k = first_k + tl.arange(0, block_k)
    offset = (images * children + child)[:, None] * child_dim + k
    tl.store(du + offset, total, mask=(images < batch)[:, None] & (k < child_dim))


@_kernel
def _gradient_of_matrices(
    u,
    weight,
    start,
    child_of,
    parent_of,
    earlier,
    q,
    size_at_parents,
    lse,
    mean,
    size_at_children,
    batch,
    children,
    parents,
    partial,
    size_of_part,
    rounds: tl.constexpr,
    through_logits: tl.constexpr,
    child_dim: tl.constexpr,
    parent_dim: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
):
    """∂W = Σ u ⊗ ∂û over one part of the edges and images of one kind, for one block of K."""
    kind, part = tl.program_id(0), tl.program_id(2)
    first_k = tl.program_id(1) * block_k
    first, stop = tl.load(start + kind), tl.load(start + kind + 1)
    image_blocks = tl.cdiv(batch, block_n)
    total = tl.zeros([block_k, block_d], tl.float32)
    # every number of parts-th pair of an edge and a block of images
    work = (stop - first).to(tl.int64) * image_blocks
    for pair in range(part.to(tl.int64), work, tl.num_programs(2)):
        e = first + pair // image_blocks
        images = pair % image_blocks * block_n + tl.arange(0, block_n)
        child, parent = tl.load(child_of + e), tl.load(parent_of + e)
        gradient = _gradient_of_votes(
            u,
            weight,
            images,
            child,
            parent,
            kind,
            earlier,
            q,
            size_at_parents,
            lse,
            mean,
            size_at_children,
            batch,
            children,
            parents,
            rounds,
            through_logits,
            child_dim,
            parent_dim,
            block_n,
            block_k,
            block_d,
        )
        pose = _poses(u, images, child, batch, children, first_k, child_dim, block_k)
        total = _dot(tl.trans(pose), gradient, total)
    k, d = first_k + tl.arange(0, block_k), tl.arange(0, block_d)
    offset = part.to(tl.int64) * size_of_part
    offset += (kind.to(tl.int64) * child_dim + k)[:, None] * parent_dim + d
    tl.store(partial + offset, total, mask=(k < child_dim)[:, None] & (d < parent_dim))


@_kernel
def _sum_tile_into_parents(
    u,
    weight,
    earlier,
    q,
    lse,
    mean,
    batch,
    children,
    children_of_tile,
    partial,
    size_of_part,
    of_gradients: tl.constexpr,
    parents: tl.constexpr,
    child_dim: tl.constexpr,
    parent_dim: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
):
    """Σ c û and the log-sum-exp, or Σ l û and Σ c a, of a tile of children with all parents."""
    tile, d = tl.program_id(0), tl.arange(0, block_d)
    images = tl.program_id(1).to(tl.int64) * block_n + tl.arange(0, block_n)
    zeros = tl.zeros([block_n, block_d], tl.float32)
    totals = ()  # one entry for each parent, as in all tuples here
    for _ in tl.static_range(parents):
        totals = totals + (zeros,)
    first = tile * children_of_tile
    for child in range(first, tl.minimum(first + children_of_tile, children)):
        pose = _poses(u, images, child, batch, children, 0, child_dim, block_k)
        u_hats, logits, most = (), (), tl.full([block_n], float("-inf"), tl.float32)
        for j in tl.static_range(parents):
            kind = tl.cast(child, tl.int64) * parents + j
            matrix = _matrix(weight, kind, 0, child_dim, parent_dim, block_k, block_d)
            u_hat = _dot(pose, matrix, zeros)
            V = _at_parent(earlier, images, j, batch, parents, parent_dim, block_d)
            logit = tl.sum(u_hat * V, 1)
            most = tl.maximum(most, logit)
            u_hats, logits = u_hats + (u_hat,), logits + (logit,)
        power = tl.zeros([block_n], tl.float32)
        for j in tl.static_range(parents):
            power += tl.exp(logits[j] - most)
        coefficients, mean_here = (), tl.zeros([block_n], tl.float32)
        for j in tl.static_range(parents):
            coefficient = tl.exp(logits[j] - most) / power
            if of_gradients:
                q_here = _at_parent(q, images, j, batch, parents, parent_dim, block_d)
                a = tl.sum(u_hats[j] * q_here, 1)
                mean_here += coefficient * a
                coefficients = coefficients + ((coefficient, a),)
            else:
                coefficients = coefficients + ((coefficient,),)
        sums = ()
        for j in tl.static_range(parents):
            coefficient = coefficients[j][0]
            if of_gradients:
                coefficient *= coefficients[j][1] - mean_here
            sums = sums + (totals[j] + coefficient[:, None] * u_hats[j],)
        totals = sums
        at_child = images * children + child
        if of_gradients:
            tl.store(mean + at_child, mean_here, mask=images < batch)
        else:
            tl.store(lse + at_child, most + tl.log(power), mask=images < batch)
    there = (images < batch)[:, None] & (d < parent_dim)
    for j in tl.static_range(parents):
        offset = (images * parents + j)[:, None] * parent_dim + d
        tl.store(partial + tile.to(tl.int64) * size_of_part + offset, totals[j], mask=there)


@_kernel
def _squash_sums_kernel(
    partial,
    parts,
    s,
    earlier,
    out,
    size,
    rows,
    dim: tl.constexpr,
    add_earlier: tl.constexpr,
    block_rows: tl.constexpr,
    block_d: tl.constexpr,
):
    """s from its parts, in their order; its squash v, or V + v."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    d = tl.arange(0, block_d)
    offset, there = row[:, None] * dim + d, (row < rows)[:, None] & (d < dim)
    total = tl.zeros([block_rows, block_d], tl.float32)
    for _ in range(parts):
        total += tl.load(partial + offset, mask=there, other=0.0)
        partial += size
    tl.store(s + offset, total, mask=there)
    square = tl.sum(total * total, 1, keep_dims=True)
    v = total * (tl.sqrt_rn(square) / (1 + square))
    if add_earlier:
        v += tl.load(earlier + offset, mask=there, other=0.0)
    tl.store(out + offset, v, mask=there)


@_kernel
def _differentiate_squash_kernel(
    gradient,
    partial,
    parts,
    s,
    q,
    total_out,
    size,
    rows,
    dim: tl.constexpr,
    keep_total: tl.constexpr,
    block_rows: tl.constexpr,
    block_d: tl.constexpr,
):
    """q = (∂squash/∂s)ᵀ of a gradient to which parts are added in their order."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    d = tl.arange(0, block_d)
    offset, there = row[:, None] * dim + d, (row < rows)[:, None] & (d < dim)
    total = tl.load(gradient + offset, mask=there, other=0.0).to(tl.float32)
    for _ in range(parts):
        total += tl.load(partial + offset, mask=there, other=0.0)
        partial += size
    if keep_total:
        tl.store(total_out + offset, total, mask=there)
    here = tl.load(s + offset, mask=there, other=0.0)
    square = tl.sum(here * here, 1, keep_dims=True)
    norm = tl.sqrt_rn(square)
    # squash is |s|/(1+|s|²) times s; at s = 0 both terms are 0, and nothing is divided by it
    unit = here / tl.where(norm > 0, norm, 1.0)
    along = tl.sum(unit * total, 1, keep_dims=True)
    # no power of |s| above the second: it would be infinite where squash itself is not
    slope = (1 - square) / (1 + square) * along * unit
    tl.store(q + offset, norm / (1 + square) * (total + slope), mask=there)
