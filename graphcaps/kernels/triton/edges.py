"""The edges of a graph in the orders in which the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.graph import is_complete
from graphcaps.kernels.edges import SortedEdges, sort_edges


@dataclass(frozen=True)
class TritonEdges:
    """What the kernels need to know of a graph, on the device where they run.

    Attributes:
        by_child, by_parent, by_kind: the edges in three orders.
        degree: each child's number of parents, float32 `[I]`.
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
    degree: Tensor
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
            degree=by_child.start.diff().float(),
            children=graph.num_nodes("child"),
            parents=graph.num_nodes("parent"),
            kinds=kinds,
            complete=is_complete(graph) and graph.num_edges() == kinds,
        )

    @property
    def tensors(self) -> list[Tensor]:
        """The three orders and the degrees, as an operation of torch takes them."""
        return [*self.by_child, *self.by_parent, *self.by_kind, self.degree]
