"""Conversion to routing graphs, from DGL graphs of any types and from `edge_index` tensors."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.graph import LARGEST_ID, VOTES, check_numbers_of, made_to_be_kept, routing_graph

CanonicalType = tuple[str, str, str]  # node type of the children, name, node type of the parents
EdgeTypes = str | CanonicalType | list[str | CanonicalType]


class Converted(NamedTuple):
    """A graph in the form of `routing_graph`, and the origin of its children."""

    graph: dgl.DGLGraph
    kinds: int  # number of matrices that it refers to
    child_types: dict[str, int]  # number of children of each node type
    order: Tensor  # index of each child in the concatenated nodes of these types, int64 [I]


def graph_from_edge_index(
    edge_index: Tensor,
    *,
    size: tuple[int, int] | None = None,
    batch: Tensor | tuple[Tensor, Tensor] | None = None,
    weight_index: Tensor | Sequence[int] | None = None,
    parent_type: Tensor | Sequence[int] | None = None,
) -> dgl.DGLGraph:
    """Create a routing graph from `edge_index` and `batch`, as in PyTorch Geometric.

    Args:
        edge_index: child (source) and parent (target) of each edge, integers, `[2, E]`.
        size: numbers of children and parents, (I, J), as for PyG's `propagate`; by default the
            lengths of `batch`, or without it the largest indices in `edge_index`, plus one.
        batch: the graph of each node, `[N]`, sorted, if children and parents are the same nodes;
            otherwise a pair of such tensors, for the children, `[I]`, and the parents, `[J]`.
        weight_index: the matrix of each edge, `[E]`, such as PyG's `edge_type`; by default all
            edges share one.
        parent_type: the type of each parent, `[J]`, see `routing_graph`; by default all parents
            have the same type.

    Returns:
        A graph in the form of `routing_graph`, on the CPU. With `batch`, it is a DGL batch, and its
        edges are sorted by graph; those of one graph keep their order.

    Raises:
        ValueError: indices are not integers, are out of range, or differ in number; `batch` is not
            sorted; or an edge joins two graphs.

    >>> edge_index = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    >>> graph = graph_from_edge_index(edge_index, batch=torch.tensor([0, 0, 1, 1]))
    >>> graph.batch_num_edges().tolist(), graph.edata["weight_index"].tolist()
    ([2, 2], [0, 0, 0, 0])
    """
    if edge_index.dim() != 2 or len(edge_index) != 2:
        raise ValueError(
            "expected edge_index of shape [2, E], the children in its first row and the parents "
            f"in its second; got {list(edge_index.shape)}"
        )
    with made_to_be_kept():
        child, parent = edge_index.cpu()
        of_child, of_parent = batch if isinstance(batch, tuple) else (batch, batch)
        if size is None and of_child is not None and of_parent is not None:
            size = (len(of_child), len(of_parent))
        elif size is None:
            size = (_one_more(child), _one_more(parent))
        if weight_index is None:
            weight_index = torch.zeros(len(child), dtype=torch.int64)
        if parent_type is None:
            parent_type = torch.zeros(size[1], dtype=torch.int64)
        graph = routing_graph(
            child,
            parent,
            children=size[0],
            parents=size[1],
            weight_index=torch.as_tensor(weight_index).cpu(),
            parent_type=torch.as_tensor(parent_type).cpu(),
        )
        if of_child is None or of_parent is None:
            return graph
        of_child, of_parent = _checked_batch(of_child), _checked_batch(of_parent)
        graphs = max(_one_more(of_child), _one_more(of_parent))
        return _as_batch(graph, of_child, of_parent, graphs)


def as_routing_graph(graph: dgl.DGLGraph, etype: EdgeTypes | None = None) -> Converted:
    """Convert a DGL graph with node and edge types of any name, in int64 or int32.

    Edges without the feature `weight_index` share one matrix with all others of their edge type,
    and parents without the feature `type` have the same type.

    Args:
        graph: a DGL graph on any device; it is not modified.
        etype: the edge type that votes, by name or as DGL's `(child type, name, parent type)`, or a
            list of edge types in the order of their matrices; by default the only one.

    Raises:
        ValueError: not a DGL graph; the edge types do not exist, or lead to several node types;
            features have the wrong type; or there are more nodes or edges than int32 can number.
    """
    etypes = _voting_types(graph, etype)
    parent_type = etypes[0][2]
    child_types = {child: graph.num_src_nodes(child) for child, _, _ in etypes}
    first = dict(zip(child_types, accumulate(child_types.values(), initial=0), strict=False))
    children, parents = sum(child_types.values()), graph.num_dst_nodes(parent_type)
    largest = max(children, parents, sum(map(graph.num_edges, etypes)))
    if largest > LARGEST_ID:
        raise ValueError(f"{largest} nodes or edges cannot be numbered in int32; split the graph")
    with made_to_be_kept():
        ends = [[x.cpu().long() for x in graph.edges(etype=kind)] for kind in etypes]
        child = torch.cat([u + first[kind[0]] for kind, (u, _) in zip(etypes, ends, strict=True)])
        parent = torch.cat([v for _, v in ends])
        weight_index, kinds = _matrices(graph, etypes)
        type_of_parent = graph.dstnodes[parent_type].data.get("type")
        if type_of_parent is None:
            type_of_parent = torch.zeros(parents, dtype=torch.int64)
        check_numbers_of("the parents' type", "J", type_of_parent)
        order = torch.arange(children)
        if graph.batch_size > 1:  # as in every batch, the children of a graph are contiguous
            of_nodes = torch.cat([_graph_of_nodes(graph, name) for name in child_types])
            order = of_nodes.argsort(stable=True)
            child = order.argsort()[child]
        copy = routing_graph(
            child,
            parent,
            children=children,
            parents=parents,
            weight_index=weight_index,
            parent_type=type_of_parent.cpu().clone(),
            competition=_on_edges(graph, etypes, "competition"),
        )
        if graph.batch_size > 1:
            of_parent = _graph_of_nodes(graph, parent_type)
            copy = _as_batch(copy, of_nodes[order], of_parent, graph.batch_size)
    return Converted(copy, kinds, child_types, order)


def _voting_types(graph: dgl.DGLGraph, etype: EdgeTypes | None) -> list[CanonicalType]:
    if not isinstance(graph, dgl.DGLGraph):
        raise ValueError(
            "expected a DGL graph, for instance from routing_graph or graph_from_edge_index; "
            f"got {type(graph).__name__}"
        )
    there = graph.canonical_etypes
    if etype is None:
        if len(there) != 1:
            raise ValueError(
                f"the graph has {len(there)} edge types, {there}; give the layer those that vote, "
                "in the order of their matrices: etype=[...]"
            )
        return there
    etypes = []
    for named in etype if isinstance(etype, list) else [etype]:
        found = [kind for kind in there if named in (kind, kind[1])]
        if len(found) != 1:
            number = "several edge types" if found else "no edge type"
            raise ValueError(
                f"the graph has {number} {named!r}; it has {there}; "
                "name one by (child type, name, parent type)"
            )
        etypes += found
    if len(set(etypes)) != len(etypes) or len({parent for _, _, parent in etypes}) != 1:
        raise ValueError(
            f"expected different edge types that lead to one node type, the parents; got {etypes}"
        )
    return etypes


def _matrices(graph: dgl.DGLGraph, etypes: list[CanonicalType]) -> tuple[Tensor, int]:
    """The matrix of each edge, in the order of edge types, and the number of matrices."""
    # batch_graph leaves out the weight_index of routing_graph, whose edges need not share a matrix
    weight_index = _on_edges(graph, etypes, "weight_index", needed=etypes == [VOTES])
    if weight_index is None:
        edges = torch.tensor([graph.num_edges(kind) for kind in etypes])
        return torch.arange(len(etypes)).repeat_interleave(edges), len(etypes)
    return weight_index, _one_more(weight_index)


def _on_edges(
    graph: dgl.DGLGraph, etypes: list[CanonicalType], name: str, *, needed: bool = False
) -> Tensor | None:
    """A feature of the edges, in the order of edge types; None if no type has it."""
    given = {kind: graph.edges[kind].data.get(name) for kind in etypes}
    if not needed and all(index is None for index in given.values()):
        return None
    for kind, index in given.items():
        if index is None:
            raise ValueError(
                f"the graph's edges of type {kind} lack the feature {name}; see routing_graph"
            )
        check_numbers_of(name, "E", index)
    return torch.cat([index.cpu() for index in given.values()])


def _graph_of_nodes(graph: dgl.DGLGraph, node_type: str) -> Tensor:
    sizes = graph.batch_num_nodes(node_type).cpu()
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def _checked_batch(batch: Tensor) -> Tensor:
    batch = batch.cpu()
    check_numbers_of("batch", "N", batch)
    if (batch.diff() < 0).any() or (batch < 0).any():
        raise ValueError("expected batch sorted, from graph 0 on; sort the nodes by graph first")
    return batch


def _as_batch(
    graph: dgl.DGLGraph, of_child: Tensor, of_parent: Tensor, graphs: int
) -> dgl.DGLGraph:
    """Make the routing graph a DGL batch, given the graph of each child and parent."""
    child, parent = (x.long() for x in graph.edges())
    for name, of_nodes in (("child", of_child), ("parent", of_parent)):
        if len(of_nodes) != graph.num_nodes(name):
            raise ValueError(
                f"there are {graph.num_nodes(name)} nodes of type {name}, but batch has "
                f"{len(of_nodes)} entries"
            )
    of_edge = of_child[child]
    if (of_edge != of_parent[parent]).any():
        raise ValueError("an edge joins a child and a parent of different graphs of the batch")
    if (of_edge.diff() < 0).any():
        order = of_edge.argsort(stable=True)
        competition = graph.edata.get("competition")
        graph = routing_graph(
            child[order],
            parent[order],
            children=len(of_child),
            parents=len(of_parent),
            weight_index=graph.edata["weight_index"][order],
            parent_type=graph.nodes["parent"].data["type"],
            competition=None if competition is None else competition[order],
        )
    sizes = [x.bincount(minlength=graphs).int() for x in (of_child, of_parent, of_edge)]
    graph.set_batch_num_nodes(dict(zip(("child", "parent"), sizes, strict=False)))
    graph.set_batch_num_edges({VOTES: sizes[2]})
    return graph


def _one_more(numbers: Tensor) -> int:
    """The largest number plus one; 0 if there are none."""
    return int(numbers.max()) + 1 if len(numbers) else 0
