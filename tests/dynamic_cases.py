"""Cases for the kernel of dynamic and uniform routing, and their dense forms."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from graphcaps import reference


class Case(NamedTuple):
    """A graph given by its edges, and the sizes of the features that are routed on it."""

    children: int
    parents: int
    edges: list[tuple[int, int]]
    batch: int
    dim: int
    iterations: int

    @property
    def mask(self) -> Tensor:
        mask = torch.zeros(self.children, self.parents, dtype=torch.bool)
        for i, j in self.edges:
            mask[i, j] = True
        return mask

    def dense(self, on_edges: Tensor) -> Tensor:
        """Edge features as `[B, I, J, ·]`, zero where there is no edge."""
        dense = on_edges.new_zeros(self.batch, self.children, self.parents, on_edges.shape[-1])
        if self.edges:
            child, parent = torch.tensor(self.edges).T
            dense[:, child, parent] = on_edges.view(self.batch, len(self.edges), -1)
        return dense


@st.composite
def cases(draw, most_nodes=6):
    """Random simple bipartite graphs, with isolated nodes and edges in any order."""
    children = draw(st.integers(1, most_nodes))
    parents = draw(st.integers(1, most_nodes))
    every_edge = [(i, j) for i in range(children) for j in range(parents)]
    edges = draw(st.lists(st.sampled_from(every_edge), unique=True, max_size=len(every_edge)))
    sizes = [draw(st.integers(1, most)) for most in (3, 4, 4)]
    return Case(children, parents, edges, *sizes)


def complete(children, parents, batch=2, dim=4, iterations=3) -> Case:
    edges = [(i, j) for i in range(children) for j in range(parents)]
    return Case(children, parents, edges, batch, dim, iterations)


def _dynamic_densely(u_hat, case):
    return reference.dynamic_routing(u_hat, case.iterations, mask=case.mask)[0]


def _uniform_densely(u_hat, case):
    mask = case.mask.to(u_hat.dtype)
    c = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand(case.batch, -1, -1)
    return reference.squash(torch.einsum("bij,bijd->bjd", c, u_hat))


ALGORITHMS = {"dynamic": _dynamic_densely, "uniform": _uniform_densely}


def route_densely(case: Case, u_hat: Tensor, algorithm: str) -> Tensor:
    """The reference's v, `[B, J, D]`, from votes on the edges."""
    return ALGORITHMS[algorithm](case.dense(u_hat), case)
