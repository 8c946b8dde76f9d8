"""Bipartite routing graphs, which define who votes for whom and with which matrix.

The order of the edges is guaranteed. The edges of one graph keep the order in which they were
given; those of a batch are sample-major, so edge `e` of sample `b` is edge `b·E + e`. A complete
graph is child-major: a feature of its batched edges, `[B·E, D]`, is `[B, I, J, D]` by a view.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from graphcaps._dgl import dgl

VOTES = ("child", "votes", "parent")
LARGEST_ID = torch.iinfo(torch.int32).max


def routing_graph(
    child: Tensor | Sequence[int],
    parent: Tensor | Sequence[int],
    *,
    children: int | None = None,
    parents: int | None = None,
    weight_index: Tensor | Sequence[int] | None = None,
    parent_type: Tensor | Sequence[int] | None = None,
    competition: Tensor | Sequence[int] | None = None,
) -> dgl.DGLGraph:
    """Create a graph that defines which child votes for which parent, and with which matrix.

    Args:
        child: index of the child of each edge, `[E]`.
        parent: index of the parent of each edge, `[E]`.
        children: number of children; by default the largest index plus one.
        parents: number of parents; by default the largest index plus one.
        weight_index: the matrix of each edge, `[E]`, integers from 0. Edges with the same number
            share a matrix. By default each edge has its own.
        parent_type: the type of each parent, `[J]`, integers from 0. Parents of one type share the
            parameters that a routing learns for parents, such as the costs β of EM routing. By
            default each parent has its own type.
        competition: the competition of each edge, `[E]`, integers from 0. The coupling of the edges
            with the same number sums to 1. By default the edges of each child compete.

    Returns:
        A DGL heterograph, int32, with node types `child` and `parent`, edge type `votes`, the
        edge feature `weight_index`, int64 `[E]`, the parent feature `type`, int64 `[J]`, and the
        edge feature `competition`, int64 `[E]`, if given. Nodes without edges are allowed.

    Raises:
        ValueError: indices are not integers, are out of range, or differ in number.

    >>> graph = routing_graph([0, 0, 1], [0, 1, 1], parents=3, weight_index=[0, 1, 0])
    >>> graph.num_nodes("child"), graph.num_nodes("parent"), graph.num_edges()
    (2, 3, 3)
    """
    with made_to_be_kept():
        child, children = _checked_numbers("child", child, children)
        parent, parents = _checked_numbers("parent", parent, parents)
        if len(child) != len(parent):
            raise ValueError(
                f"each edge needs one child and one parent; "
                f"got {len(child)} children and {len(parent)} parents"
            )
        if weight_index is None:
            weight_index = torch.arange(len(child))
        on_edges = {"weight_index": weight_index}
        if competition is not None:
            on_edges["competition"] = competition
        for name, numbers in on_edges.items():
            on_edges[name], _ = _checked_numbers(name, numbers, None)
            if len(on_edges[name]) != len(child):
                raise ValueError(
                    f"{name} needs one number per edge, {len(child)}; got {len(on_edges[name])}"
                )
        graph = dgl.heterograph(
            {VOTES: (child, parent)}, {"child": children, "parent": parents}, idtype=torch.int32
        )
        graph.edata.update(on_edges)
        if parent_type is None:
            parent_type = torch.arange(parents)
        parent_type, _ = _checked_numbers("parent_type", parent_type, None)
        if len(parent_type) != parents:
            raise ValueError(
                f"parent_type needs one number per parent, {parents}; got {len(parent_type)}"
            )
        graph.nodes["parent"].data["type"] = parent_type.to(graph.device)
        return graph


def complete_graph(children: int, parents: int) -> dgl.DGLGraph:
    """Create a graph in which every child votes for every parent, with one matrix for each edge.

    Args:
        children: number of children, I.
        parents: number of parents, J.

    Returns:
        A graph in the form of `routing_graph`, with `I·J` edges in child-major order.

    Raises:
        ValueError: a number below 1.

    >>> complete_graph(children=1152, parents=10).num_edges()
    11520
    """
    if children < 1 or parents < 1:
        raise ValueError(
            f"a complete graph needs at least 1 child and 1 parent; got {children} and {parents}"
        )
    with made_to_be_kept():
        return routing_graph(
            torch.arange(children).repeat_interleave(parents),
            torch.arange(parents).repeat(children),
            children=children,
            parents=parents,
        )


def batch_graph(graph: dgl.DGLGraph, batch_size: int) -> dgl.DGLGraph:
    """Repeat a graph for each sample, as one DGL graph without features.

    All of DGL's sparse formats are created here, so that later calls need not create them.

    Args:
        graph: a graph from `routing_graph`; it is not modified.
        batch_size: number of samples, B; 0 gives a graph without nodes.

    Returns:
        A batched graph of `B·I` children, `B·J` parents and `B·E` edges, sample-major.

    Raises:
        ValueError: a negative batch size, or more nodes or edges than int32 can number.

    >>> batch_graph(complete_graph(3, 2), 4).batch_num_edges().tolist()
    [6, 6, 6, 6]
    """
    most = max(graph.num_nodes("child"), graph.num_nodes("parent"), graph.num_edges())
    if not 0 <= batch_size * most <= LARGEST_ID:
        raise ValueError(
            f"a batch of {batch_size} graphs with {graph.num_edges()} edges cannot be numbered "
            "in int32; use a batch size from 0, small enough for 2³¹ − 1 edges"
        )
    with made_to_be_kept():
        alone = dgl.heterograph(
            {VOTES: graph.edges()},
            {kind: graph.num_nodes(kind) for kind in ("child", "parent")},
            idtype=torch.int32,
        )
        nothing = _graph_without_nodes(graph.device)
        batched = dgl.batch([alone] * batch_size) if batch_size else nothing
        batched.create_formats_()
    return batched


@contextmanager
def made_to_be_kept() -> Iterator[None]:
    """A context in which new tensors are ordinary CPU tensors that can be cached for later calls.

    It disables the modes of the caller: under `torch.device("meta")` and FakeTensorMode tensors
    have no values, `torch.func` wraps them, and those created under `torch.inference_mode()` cannot
    be saved for a backward pass.
    """
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        # as a context, a device slows down every operation, so it is entered only if needed
        nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
        torch.inference_mode(False),
    ):
        yield


def check_weight_index(graph: dgl.DGLGraph, kinds: int | None = None) -> None:
    """Raise ValueError unless `weight_index` refers to `kinds` matrices."""
    index = graph.edata.get("weight_index")
    if index is None:
        raise ValueError("the graph's edges lack the feature weight_index; see routing_graph")
    check_numbers_of("weight_index", "E", index)
    if len(index) and (index.min() < 0 or (kinds is not None and index.max() >= kinds)):
        raise ValueError(
            f"weight_index runs from {int(index.min())} to {int(index.max())}, "
            f"but there are {kinds} matrices, numbered from 0"
        )


def competition_of_edges(graph: dgl.DGLGraph) -> tuple[Tensor | None, int]:
    """Return the competition of each edge, int64 `[E]` from 0, and the number of competitions.

    Competitions of different graphs in a batch differ. None if the edges of each child compete.
    """
    index = graph.edata.get("competition")
    if index is None:
        return None, graph.num_nodes("child")
    sizes = graph.batch_num_nodes("child").to(index.device)
    graph_of_child = torch.arange(len(sizes), device=index.device).repeat_interleave(sizes)
    most = int(index.max()) + 1 if len(index) else 0
    child, _ = graph.edges()
    different, number = (graph_of_child[child.long()] * most + index).unique(return_inverse=True)
    return number, len(different)


def check_numbers_of(name: str, size: str, index: Tensor) -> None:
    """Raise ValueError unless the tensor is one-dimensional int64; `size` names its length."""
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"expected {name} as int64 [{size}]; got {index.dtype} {list(index.shape)}"
        )


def is_complete(graph: dgl.DGLGraph) -> bool:
    """Whether the edges are those of `complete_graph`, in its order, with its own matrices."""
    parents = graph.num_nodes("parent")
    edges = torch.arange(graph.num_edges(), device=graph.device)
    if not len(edges) or len(edges) != graph.num_nodes("child") * parents:
        return False
    child, parent = graph.edges()
    return bool(
        (child == edges // parents).all()
        and (parent == edges % parents).all()
        and (graph.edata["weight_index"] == edges).all()
    )


def _checked_numbers(
    name: str, numbers: Tensor | Sequence[int], count: int | None
) -> tuple[Tensor, int]:
    if not isinstance(numbers, Tensor):
        numbers = torch.as_tensor(numbers)
    if numbers.numel() == 0:
        numbers = numbers.long()
    if numbers.dim() != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise ValueError(
            f"{name} needs integers, one per edge; "
            f"got {numbers.dtype} of shape {list(numbers.shape)}"
        )
    numbers = numbers.long()
    least, most = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, -1)
    count = most + 1 if count is None else count
    if least < 0 or most >= count:
        raise ValueError(
            f"{name} runs from {least} to {most}, but must lie between 0 and {count - 1}"
        )
    return numbers, count


def _graph_without_nodes(device: torch.device) -> dgl.DGLGraph:
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    return dgl.heterograph(
        {VOTES: (nothing, nothing)}, {"child": 0, "parent": 0}, idtype=torch.int32
    )
