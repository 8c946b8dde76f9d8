"""The edges of a graph sorted by child, by parent, by matrix or by competition."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from graphcaps._dgl import dgl


class SortedEdges(NamedTuple):
    """Edges sorted so that those of one child, parent, matrix or competition are contiguous.

    The edges of number n are `start[n]` to `start[n + 1] − 1`. The sort is stable. All tensors are
    int32.
    """

    start: Tensor  # [N + 1], for N children, parents, matrices or competitions
    child: Tensor  # [E]
    parent: Tensor  # [E]
    kind: Tensor  # [E], weight_index


def sort_edges(
    graph: dgl.DGLGraph, by: Literal["child", "parent", "kind"], kinds: int, device: torch.device
) -> SortedEdges:
    """Sort the edges of a graph by child (CSR), by parent (CSC) or by matrix.

    Args:
        graph: from `routing_graph`, `complete_graph` or `dgl.batch` of such.
        by: the sort key.
        kinds: number of matrices, M.
        device: the device of the result.

    Returns:
        The edges, sorted.

    >>> from graphcaps import routing_graph
    >>> graph = routing_graph([1, 0, 1], [0, 1, 2])
    >>> edges = sort_edges(graph, "child", kinds=3, device=torch.device("cpu"))
    >>> edges.start.tolist(), edges.parent.tolist(), edges.kind.tolist()
    ([0, 1, 3], [1, 0, 2], [1, 0, 2])
    """
    child, parent = (ends.to(device, torch.int64) for ends in graph.edges())
    ends = {"child": child, "parent": parent, "kind": graph.edata["weight_index"].to(device)}
    counts = {
        "child": graph.num_nodes("child"),
        "parent": graph.num_nodes("parent"),
        "kind": kinds,
    }
    in_order = bool((ends[by].diff() >= 0).all())  # as builders of graphs give them
    order = slice(None) if in_order else ends[by].argsort(stable=True)
    start = torch.zeros(counts[by] + 1, dtype=torch.int64, device=device)
    start[1:] = torch.bincount(ends[by], minlength=counts[by]).cumsum(0)
    return SortedEdges(start.int(), *(ends[name][order].int() for name in ends))
