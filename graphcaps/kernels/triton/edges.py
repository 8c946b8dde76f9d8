"""The edges of a graph, sorted in the three ways that the kernels need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.graph import is_complete
from graphcaps.kernels.edges import SortedEdges, sort_edges


@dataclass(frozen=True)
class TritonEdges:
    """The edges of a graph, on the device where the kernels run.

    Attributes:
        by_child, by_parent, by_kind: the edges in three orders.
        degree: each child's number of parents, float32 `[I]`.
        children, parents, kinds: I, J, M.
        complete: whether the graph is that of `complete_graph`, with one matrix for each edge.

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
        """Sort the edges of a graph; meant to be called once, not in each forward pass.

        Args:
            graph: from `routing_graph`, `complete_graph` or `dgl.batch` of such.
            kinds: number of matrices, M.
            device: the device on which the kernels will run.
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
        """The three orders and the degrees, as the list that the custom operations take."""
        return [*self.by_child, *self.by_parent, *self.by_kind, self.degree]
