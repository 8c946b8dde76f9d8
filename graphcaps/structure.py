"""A checked routing graph, with a cache for the data that engines prepare for it."""

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.conversion import EdgeTypes, as_routing_graph
from graphcaps.graph import (
    check_weight_index,
    competition_of_edges,
    is_complete,
    made_to_be_kept,
)

T = TypeVar("T")
BATCH_SIZES_KEPT = 4  # those of training, evaluation, and the shorter last batch of each
GRAPHS_KEPT = 8  # the last ones that calls of layers were given
TERMS = 32  # the least length of a partial sum


@dataclass(frozen=True)
class Groups:
    """Edges of one child, parent, matrix or competition, summed in parts.

    Adding thousands of terms one by one in float32 is less precise than the dense form. The n edges
    of a group are therefore divided into parts of at most √n edges, or 32 if that is more; each
    part is summed first, then the sums of the parts.

    Attributes:
        index: the group of each edge, int64 `[E]`.
        part: the part of each edge, int64 `[E]`; None if every group is a single part.
        owner: the group of each part, int64; None if every group is a single part.
        count: number of groups.
    """

    index: Tensor
    part: Tensor | None
    owner: Tensor | None
    count: int

    @classmethod
    def of(cls, index: Tensor, count: int) -> "Groups":
        """Divide the edges of each group into parts, in the order of the edges."""
        sizes = torch.bincount(index, minlength=count)
        largest = int(sizes.max()) if len(sizes) else 0
        if largest <= TERMS:
            return cls(index, None, None, count)
        terms = max(TERMS, int(largest**0.5))
        order = index.argsort(stable=True)
        start = sizes.cumsum(0) - sizes
        rank = torch.empty_like(index)
        rank[order] = torch.arange(len(index)) - start[index[order]]
        parts = (sizes + terms - 1) // terms
        first_part = parts.cumsum(0) - parts
        owner = torch.arange(count).repeat_interleave(parts)
        return cls(index, first_part[index] + rank // terms, owner, count)

    def to(self, device: torch.device) -> "Groups":
        """Copy to another device."""
        part, owner = (x if x is None else x.to(device) for x in (self.part, self.owner))
        return Groups(self.index.to(device), part, owner, self.count)

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """Sum over the edges of every group along `dim`, whose size goes from E to `count`."""
        if self.part is None or self.owner is None:
            return _index_add(x, dim, self.index, self.count)
        parts = _index_add(x, dim, self.part, len(self.owner))
        return _index_add(parts, dim, self.owner, self.count)

    def expand(self, x: Tensor, dim: int) -> Tensor:
        """Copy the values of every group to its edges along `dim`, from size `count` to E.

        The gradient is a sum over edges, which is taken in parts as well.
        """
        if self.part is None or self.owner is None:
            return x.index_select(dim, self.index)
        return x.index_select(dim, self.owner).index_select(dim, self.part)


def _index_add(x: Tensor, dim: int, index: Tensor, count: int) -> Tensor:
    zeros = x.new_zeros((*x.shape[:dim], count, *x.shape[dim + 1 :]))
    if torch.onnx.is_in_onnx_export():
        # index_add is exported as ScatterND, in which onnxruntime's threads race for equal rows
        index = index.view(*[1] * dim, -1, *[1] * (x.dim() - dim - 1)).expand_as(x)
        return zeros.scatter_add(dim, index, x)
    return zeros.index_add(dim, index, x)


class Structure:
    """The graph of one sample as layers use it: checked and copied once.

    Args:
        graph: any DGL graph whose edges of type `etype` lead from children to parents. It is
            copied and not modified; later changes to it have no effect.
        kinds: number of matrices; by default as many as the graph refers to.
        etype: see `as_routing_graph`.

    Attributes:
        graph: a copy in the form of `routing_graph`, with `weight_index` and `type`, and
            `competition` if the graph has it.
        child_types: the node types of the children, with the number of children of each.
        order: the index of each child in the concatenated nodes of these types, int64 `[I]`.
        children, parents, edges: I, J, E; for a batch, of all its graphs together.
        kinds, types: number of matrices M, and of types of parents T.
        child, parent, weight_index: of each edge, int64 `[E]` on the CPU.
        parent_type: of each parent, int64 `[J]` on the CPU.
        competition: the competition of each edge, int64 `[E]` on the CPU: its child, unless the
            graph defines another. Edges of different graphs in a batch never compete.
        competitions: number of competitions.
        by_child: whether the edges of each child compete.
        graph_of_parent: the graph in the batch that each parent belongs to, int64 `[J]` on the CPU.
        graphs: number of graphs in the batch; 1 if the graph is not a batch.
        complete: whether each edge has its own matrix, in the order of `complete_graph`.

    Raises:
        ValueError: not a bipartite graph of this kind, or it refers to more matrices.
    """

    def __init__(
        self, graph: dgl.DGLGraph, *, kinds: int | None = None, etype: EdgeTypes | None = None
    ) -> None:
        with made_to_be_kept():
            self.graph, wanted, self.child_types, self.order = as_routing_graph(graph, etype)
            check_weight_index(self.graph, kinds)
            child, parent = self.graph.edges()
            self.child, self.parent = child.long(), parent.long()
            self.weight_index = self.graph.edata["weight_index"]
            self.children, self.parents = (self.graph.num_nodes(n) for n in ("child", "parent"))
            self.edges = self.graph.num_edges()
            self.parent_type = self.graph.nodes["parent"].data["type"]
            sizes = self.graph.batch_num_nodes("parent")
            self.graphs = len(sizes)
            self.graph_of_parent = torch.arange(self.graphs).repeat_interleave(sizes)
            self.complete = is_complete(self.graph)
            competition, self.competitions = competition_of_edges(self.graph)
            self.by_child = competition is None
            self.competition = self.child if competition is None else competition
            if competition is not None:
                self.graph.edata["competition"] = competition
            self.kinds = wanted if kinds is None else kinds
            self.types = _count(self.parent_type)
        self._kept: dict[Hashable, Any] = {}
        self._kept_for_batch: dict[Hashable, Any] = {}

    def join(self, name: str, x: Tensor | Mapping[str, Tensor], dim: int) -> Tensor:
        """Join a feature of the children, `[…, I, …]`, from the features of their node types.

        Args:
            name: name of the feature in error messages.
            x: the feature as one tensor, or a tensor for each node type.
            dim: the dimension of the children, negative.

        Raises:
            ValueError: node types or numbers of nodes do not match, shapes or dtypes differ, or
                `x` is one tensor although the children have several node types.
        """
        if isinstance(x, Tensor) and len(self.child_types) == 1:
            return x
        told = x.shape if isinstance(x, Tensor) else {n: list(y.shape) for n, y in x.items()}
        if not isinstance(x, Tensor):
            counts = {n: y.shape[dim] if y.dim() >= -dim else None for n, y in x.items()}
            others = {(y.shape[:dim], y.shape[dim:][1:], y.dtype, y.device) for y in x.values()}
            if counts == self.child_types and len(others) == 1:
                joined = torch.cat([x[node_type] for node_type in self.child_types], dim)
                return joined.index_select(dim, self.numbers("order", joined.device))
        raise ValueError(
            f"expected {name} as a dict, with one tensor for each node type that has children, "
            f"{self.child_types}, which agree in dtype and in all other sizes; got {told}"
        )

    def prepare(self, device: torch.device) -> None:
        """Fill the cache for a device, because it cannot be filled while torch traces a call."""
        for by in ("child", "parent", "kind", "competition"):
            self.groups(by, device)
        for name in ("parent_type", "graph_of_parent", "order"):
            self.numbers(name, device)
        self.rivals(device)
        if self._even:
            self.degree(device)

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the cached value for a key, calling `make` the first time."""
        if key not in self._kept:
            self._kept[key] = _made(make)
        return self._kept[key]

    def keep_for_batch(self, key: Hashable, make: Callable[[], T]) -> T:
        """The same for values that depend on the batch size, in a small least-recently-used cache.

        Several threads may call it at once.
        """
        found = self._kept_for_batch.pop(key, None)
        if found is None:
            found = _made(make)
        self._kept_for_batch[key] = found  # the most recently used is last
        for oldest in list(self._kept_for_batch)[:-BATCH_SIZES_KEPT]:
            self._kept_for_batch.pop(oldest, None)
        return found

    def groups(self, by: str, device: torch.device) -> Groups:
        """Group the edges by `"child"`, `"parent"`, `"kind"` (matrix) or `"competition"`."""
        index, count = {
            "child": (self.child, self.children),
            "parent": (self.parent, self.parents),
            "kind": (self.weight_index, self.kinds),
            "competition": (self.competition, self.competitions),
        }[by]
        return self.keep(("groups", by, device), lambda: Groups.of(index, count).to(device))

    def numbers(self, name: str, device: torch.device) -> Tensor:
        """One of the attributes that are tensors, on a device."""
        return self.keep((name, device), lambda: getattr(self, name).to(device))

    def rivals(self, device: torch.device) -> Tensor:
        """Number of edges that compete with each edge, itself included, int64 `[E]`."""

        def count() -> Tensor:
            sizes = torch.bincount(self.competition, minlength=self.competitions)
            return sizes[self.competition].to(device)

        return self.keep(("rivals", device), count)

    def degree(self, device: torch.device) -> Tensor:
        """Number of edges that an edge of each child competes with, itself included, int64 `[I]`.

        Raises:
            ValueError: the number differs between the edges of a child.
        """
        if not self._even:
            raise ValueError(
                "the edges of a child compete with different numbers of edges; this routing needs "
                "a graph in which these numbers are equal"
            )
        return self.keep(("degree", device), lambda: self._most_rivals("amax").to(device))

    @property
    def _even(self) -> bool:
        def compare() -> bool:
            return torch.equal(self._most_rivals("amax"), self._most_rivals("amin"))

        return self.by_child or self.keep("even", compare)

    def _most_rivals(self, most: str) -> Tensor:
        rivals, none = self.rivals(torch.device("cpu")), torch.zeros(self.children).long()
        return none.scatter_reduce(0, self.child, rivals, most, include_self=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_kept_for_batch": {}}  # caches are filled on demand


@torch.compiler.disable
def _made(make: Callable[[], T]) -> T:
    with made_to_be_kept():
        return make()


def _count(numbers: Tensor) -> int:
    return int(numbers.max()) + 1 if len(numbers) else 0


class _Seen(NamedTuple):
    content: list[Tensor | None]
    structure: Structure


_seen: WeakKeyDictionary[dgl.DGLGraph, dict[Hashable, _Seen]] = WeakKeyDictionary()
_lock = threading.Lock()


@torch.compiler.disable
def structure_of(graph: dgl.DGLGraph, kinds: int, etype: EdgeTypes | None = None) -> Structure:
    """Return `Structure(graph, kinds=kinds, etype=etype)`, cached for the last few graphs.

    It is made anew if the graph's edges, batch or features changed since the last call.
    """
    if not isinstance(graph, dgl.DGLGraph):
        return Structure(graph, kinds=kinds, etype=etype)  # which tells what is expected
    # a list of three names is not the edge type with these three
    key = (kinds, "several", *etype) if isinstance(etype, list) else (kinds, etype)
    with _lock:
        of_graph = _seen.pop(graph, {})
        _seen[graph] = of_graph  # the most recently used is last
        for oldest in list(_seen)[:-GRAPHS_KEPT]:
            _seen.pop(oldest, None)
    with made_to_be_kept():
        content, seen = _content(graph), of_graph.get(key)
        if seen is None or not all(map(_same, seen.content, content)):
            copies = [x if x is None else x.clone() for x in content]
            seen = _Seen(copies, Structure(graph, kinds=kinds, etype=etype))
            of_graph[key] = seen
            for oldest in list(of_graph)[:-GRAPHS_KEPT]:
                of_graph.pop(oldest, None)
    return seen.structure


def forget_graphs() -> None:
    """Empty the cache of `structure_of`, to measure what it saves."""
    with _lock:
        _seen.clear()


def _content(graph: dgl.DGLGraph) -> list[Tensor | None]:
    """All that `Structure` reads of a graph."""
    content = [graph.batch_num_nodes(node_type) for node_type in graph.ntypes]
    for kind in graph.canonical_etypes:
        features = graph.edges[kind].data
        content += [*graph.edges(etype=kind), *map(features.get, ("weight_index", "competition"))]
        content.append(graph.dstnodes[kind[2]].data.get("type"))
    return content


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)
