"""Helpers for tests of the pass over the edges: graphs, features, and a dense form of the pass."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import graphcaps as gc
from graphcaps import kernels

CPU = torch.device("cpu")
FEATURES = ("a", "k", "p", "q", "r", "beta", "prior")
FLAGS = ("leak", "squares")


class Graph(NamedTuple):
    """A bipartite graph by its edges, each with the number of its matrix."""

    children: int
    parents: int
    edges: list[tuple[int, int, int]]
    kinds: int

    @property
    def columns(self) -> Tensor:
        """Children, parents and matrices of the edges, `[3, E]`."""
        return torch.tensor(self.edges, dtype=torch.int64).reshape(-1, 3).T

    def prepared(self, device: torch.device = CPU):
        child, parent, kind = self.columns
        graph = gc.routing_graph(
            child, parent, children=self.children, parents=self.parents, weight_index=kind
        )
        return kernels.prepare(graph, self.kinds, device)


class Sizes(NamedTuple):
    batch: int = 2
    rows: int = 1
    child_dim: int = 3
    parent_dim: int = 4


def complete(children: int, parents: int, kinds: int | None = None) -> Graph:
    """A complete graph with one matrix for each edge, or with `kinds` matrices in turn."""
    every = children * parents
    edges = [(e // parents, e % parents, e % (kinds or every)) for e in range(every)]
    return Graph(children, parents, edges, kinds or every)


@st.composite
def graphs(draw, most_nodes=6):
    """Random graphs, with isolated nodes, edges in any order and parallel edges."""
    children, parents = draw(st.integers(1, most_nodes)), draw(st.integers(1, most_nodes))
    kinds = draw(st.integers(1, 5))
    ends = (st.integers(0, n - 1) for n in (children, parents, kinds))
    edges = draw(st.lists(st.tuples(*ends), max_size=20))
    return Graph(children, parents, edges, kinds)


@st.composite
def sizes(draw):
    return Sizes(
        batch=draw(st.sampled_from([1, 2, 3, 17])),
        rows=draw(st.sampled_from([1, 2, 4])),
        child_dim=draw(st.sampled_from([1, 3, 4, 9])),
        parent_dim=draw(st.sampled_from([1, 2, 4, 7])),
    )


def make_features(graph: Graph, size: Sizes, names=(), dtype=torch.float64, scale=1.0):
    """Random poses and matrices, and those of the features of a pass that are named."""
    batch, rows, child_dim, parent_dim = size
    pose = (batch, graph.parents, rows * parent_dim)
    shapes = {
        "u": (batch, graph.children, rows * child_dim),
        "weight": (graph.kinds, child_dim, parent_dim),
        "a": (batch, graph.children),
        "k": pose[:2],
        "p": pose,
        "q": pose,
        "r": pose,
        "beta": (graph.kinds,),
        "prior": (graph.kinds,),
    }
    drawn = {name: torch.randn(shapes[name], dtype=torch.float64) for name in shapes}
    drawn["weight"] *= scale
    return {name: drawn[name].to(dtype) for name in ("u", "weight", *names)}


def couple(graph: Graph, size: Sizes, features: dict[str, Tensor], flags=()) -> tuple[Tensor, ...]:
    """N, S and, if requested, Q, computed by the kernel."""
    rest = dict(features)
    u, weight, a = rest.pop("u"), rest.pop("weight"), rest.pop("a", None)
    votes = kernels.Votes(u, weight, graph.prepared(), a, size.rows)
    sums = votes.couple(**rest, **dict.fromkeys(flags, True))
    return tuple(x for x in sums if x is not None)


def couple_densely(
    graph: Graph, size: Sizes, features: dict[str, Tensor], flags=()
) -> tuple[Tensor, ...]:
    """The same by definition: votes on all edges, and one softmax for each child."""
    child, parent, kind = graph.columns
    get = features.get
    u = features["u"].unflatten(2, (size.rows, -1))
    votes = torch.einsum("bepk,ekd->bepd", u[:, child], features["weight"][kind]).flatten(2)
    y = votes if get("r") is None else votes - get("r")[:, parent]
    b = y.new_zeros(y.shape[:2])
    if get("k") is not None:
        b = b + get("k")[:, parent]
    if get("p") is not None:
        b = b + torch.einsum("bed,bed->be", get("p")[:, parent], y)
    if get("q") is not None:
        b = b + torch.einsum("bed,bed->be", get("q")[:, parent], y.square())
    if get("prior") is not None:
        b = b + get("prior")[kind]
    c = torch.zeros_like(b)
    for i in range(graph.children):
        own = (child == i).nonzero()[:, 0]
        logits = b[:, own]
        if "leak" in flags:
            logits = torch.cat([logits, torch.zeros_like(b[:, :1])], dim=1)
        c = c.index_copy(1, own, logits.softmax(dim=1)[:, : len(own)])
    if "detach_coupling" in flags:
        c = c.detach()
    w = c if get("beta") is None else c + get("beta")[kind]
    if get("a") is not None:
        w = w * get("a")[:, child]
    into = torch.zeros(len(child), graph.parents, dtype=y.dtype)
    into[torch.arange(len(child)), parent] = 1
    sums = [torch.einsum("be,ej->bj", w, into), torch.einsum("be,bed,ej->bjd", w, y, into)]
    if "squares" in flags:
        sums.append(torch.einsum("be,bed,ej->bjd", w, y.square(), into))
    return tuple(sums)


def couple_completely(
    graph: Graph, size: Sizes, features: dict[str, Tensor], flags=()
) -> tuple[Tensor, ...]:
    """The same for `complete` graphs, on `[B, I, J, D]`, for sizes where the other is too slow."""
    get = features.get
    children, parents = graph.children, graph.parents
    kind = graph.columns[2].view(children, parents)
    u = features["u"].unflatten(2, (size.rows, -1))
    y = torch.einsum("bipk,ijkd->bijpd", u, features["weight"][kind]).flatten(3)
    if get("r") is not None:
        y = y - get("r")[:, None]
    b = y.new_zeros(y.shape[:3])
    if get("k") is not None:
        b = b + get("k")[:, None]
    if get("p") is not None:
        b = b + torch.einsum("bjd,bijd->bij", get("p"), y)
    if get("q") is not None:
        b = b + torch.einsum("bjd,bijd->bij", get("q"), y.square())
    if get("prior") is not None:
        b = b + get("prior")[kind]
    if "leak" in flags:
        b = torch.cat([b, torch.zeros_like(b[..., :1])], dim=2)
    c = b.softmax(dim=2)[..., :parents]
    w = c if get("beta") is None else c + get("beta")[kind]
    if get("a") is not None:
        w = w * get("a")[..., None]
    sums = [w.sum(dim=1), torch.einsum("bij,bijd->bjd", w, y)]
    if "squares" in flags:
        sums.append(torch.einsum("bij,bijd->bjd", w, y.square()))
    return tuple(sums)


def with_gradients(pass_, graph: Graph, size: Sizes, features: dict[str, Tensor], flags=()):
    """The sums, and the gradients of a fixed random functional of them, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in features.items()}
    sums = pass_(graph, size, leaves, flags)
    generator = torch.Generator().manual_seed(1)
    loss = sum(0 * x.sum() for x in leaves.values())  # where there is no edge
    for x in sums:
        functional = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x * functional.to(x)).sum()
    gradients = torch.autograd.grad(loss, tuple(leaves.values()))
    named = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return dict(zip("NSQ", (x.detach() for x in sums), strict=False)) | named
