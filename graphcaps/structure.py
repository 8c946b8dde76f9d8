"""A checked routing graph, and everything that engines prepare for it and keep."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.graph import (
    check_parent_type,
    check_structure,
    check_weight_index,
    is_complete,
    made_to_be_kept,
)

T = TypeVar("T")
BATCH_SIZES_KEPT = 4  # those of training, evaluation, and the shorter last batch of each
TERMS = 32  # summed one after the other, at least


@dataclass(frozen=True)
class Groups:
    """Edges of one child, parent or matrix, summed in parts.

    A sum of thousands of terms in float32, one after the other, errs more than the dense form; so
    at most √n of a group's n edges, or 32, are one part, and the parts are summed apart.

    Attributes:
        index: the child, parent or matrix of each edge, int64 `[E]`.
        part: the part that each edge belongs to, int64 `[E]`; None if every group is one part.
        owner: the child, parent or matrix that each part belongs to, int64; None likewise.
        count: number of children, parents or matrices.
    """

    index: Tensor
    part: Tensor | None
    owner: Tensor | None
    count: int

    @classmethod
    def of(cls, index: Tensor, count: int) -> "Groups":
        """Part the edges of each group in the order in which they stand."""
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
        """The same numbers on another device."""
        part, owner = (x if x is None else x.to(device) for x in (self.part, self.owner))
        return Groups(self.index.to(device), part, owner, self.count)

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """Add up the edges of every group along `dim`: from E to `count`."""
        if self.part is None or self.owner is None:
            return _index_add(x, dim, self.index, self.count)
        parts = _index_add(x, dim, self.part, len(self.owner))
        return _index_add(parts, dim, self.owner, self.count)

    def expand(self, x: Tensor, dim: int) -> Tensor:
        """What a group has, on each of its edges along `dim`: from `count` to E.

        Its gradient is a sum over edges, and is taken in parts, too.
        """
        if self.part is None or self.owner is None:
            return x.index_select(dim, self.index)
        return x.index_select(dim, self.owner).index_select(dim, self.part)


def _index_add(x: Tensor, dim: int, index: Tensor, count: int) -> Tensor:
    zeros = x.new_zeros((*x.shape[:dim], count, *x.shape[dim + 1 :]))
    if torch.onnx.is_in_onnx_export():
        # index_add becomes ScatterND, and onnxruntime's threads lose terms that meet in one row
        index = index.view(*[1] * dim, -1, *[1] * (x.dim() - dim - 1)).expand_as(x)
        return zeros.scatter_add(dim, index, x)
    return zeros.index_add(dim, index, x)


class Structure:
    """One sample's graph as layers use it: checked once, copied, never read again.

    Args:
        graph: from `routing_graph`, `complete_graph` or `dgl.batch` of such; not written on, and
            not looked at later: what is written on it afterwards changes nothing.
        kinds: number of matrices that there are; as many as the graph asks for, if not given.

    Attributes:
        graph: a copy with `weight_index` and `type`.
        children, parents, edges: I, J, E; of the whole graph, where it is a batch.
        kinds, types: number of matrices M, and of types of parents T.
        child, parent, weight_index: of each edge, int64 `[E]` on the CPU.
        parent_type: of each parent, int64 `[J]` on the CPU.
        graph_of_parent: which graph of a batch each parent belongs to, int64 `[J]` on the CPU.
        graphs: number of graphs in the batch; 1 for a graph that is none.
        complete: whether each edge has a matrix of its own, in the order of `complete_graph`.

    Raises:
        ValueError: no graph of this kind, or one that asks for more matrices.
    """

    def __init__(self, graph: dgl.DGLGraph, *, kinds: int | None = None) -> None:
        with made_to_be_kept():
            check_structure(graph)
            check_weight_index(graph, kinds)
            check_parent_type(graph)
            self.graph = graph.clone().to("cpu")
            child, parent = self.graph.edges()
            self.child, self.parent = child.long(), parent.long()
            self.weight_index = self.graph.edata["weight_index"].clone()
            self.graph.edata["weight_index"] = self.weight_index
            self.children, self.parents = (self.graph.num_nodes(n) for n in ("child", "parent"))
            self.edges = self.graph.num_edges()
            parent_type = self.graph.nodes["parent"].data.get("type")
            self.parent_type = (
                torch.arange(self.parents) if parent_type is None else parent_type.clone()
            )
            self.graph.nodes["parent"].data["type"] = self.parent_type
            sizes = self.graph.batch_num_nodes("parent")
            self.graphs = len(sizes)
            self.graph_of_parent = torch.arange(self.graphs).repeat_interleave(sizes)
            self.complete = is_complete(self.graph)
            self.kinds = _count(self.weight_index) if kinds is None else kinds
            self.types = _count(self.parent_type)
        self._kept: dict[Hashable, Any] = {}
        self._kept_for_batch: dict[Hashable, Any] = {}

    def prepare(self, device: torch.device) -> None:
        """Make what calls on a device need, so that one that is traced has nothing to make."""
        for by in ("child", "parent", "kind"):
            self.groups(by, device)
        self.numbers("parent_type", device)
        self.numbers("graph_of_parent", device)
        self.degree(device)

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made at the first call with this key and kept for the next ones."""
        if key not in self._kept:
            self._kept[key] = _made(make)
        return self._kept[key]

    def keep_for_batch(self, key: Hashable, make: Callable[[], T]) -> T:
        """The same for what depends on the batch size: what was not used for longest is dropped.

        Several threads may ask at once.
        """
        found = self._kept_for_batch.pop(key, None)
        if found is None:
            found = _made(make)
        self._kept_for_batch[key] = found  # the last used stands last
        for oldest in list(self._kept_for_batch)[:-BATCH_SIZES_KEPT]:
            self._kept_for_batch.pop(oldest, None)
        return found

    def groups(self, by: str, device: torch.device) -> Groups:
        """The edges of each `"child"`, `"parent"` or `"kind"` (matrix), on a device."""
        count = {"child": self.children, "parent": self.parents, "kind": self.kinds}[by]
        index = {"child": self.child, "parent": self.parent, "kind": self.weight_index}[by]
        return self.keep(("groups", by, device), lambda: Groups.of(index, count).to(device))

    def numbers(self, name: str, device: torch.device) -> Tensor:
        """One of the attributes that are tensors, on a device."""
        return self.keep((name, device), lambda: getattr(self, name).to(device))

    def degree(self, device: torch.device) -> Tensor:
        """Number of parents of each child, int64 `[I]`."""

        def count() -> Tensor:
            return torch.bincount(self.child, minlength=self.children).to(device)

        return self.keep(("degree", device), count)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_kept_for_batch": {}}  # made again on demand


@torch.compiler.disable
def _made(make: Callable[[], T]) -> T:
    with made_to_be_kept():
        return make()


def _count(numbers: Tensor) -> int:
    return int(numbers.max()) + 1 if len(numbers) else 0
