"""Routing's message passing as torch's index operations: any device, DGL holds the structure."""

from collections.abc import Callable

import torch
from torch import Tensor

from graphcaps._dgl import dgl


class ScatterEngine:
    """Gather by index, scatter by index; the graph itself stays where it is."""

    def __init__(self, graph: dgl.DGLGraph, device: torch.device) -> None:
        child, parent = graph.edges()
        self.child = child.to(device, torch.int64)
        self.parent = parent.to(device, torch.int64)
        self.edges = graph.num_edges()
        self.children = graph.num_nodes("child")
        self.parents = graph.num_nodes("parent")

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        return None

    def softmax_over_parents(self, b: Tensor) -> Tensor:
        b = b.squeeze(-1)
        largest = b.new_zeros(self.children).scatter_reduce(
            0, self.child, b.detach(), "amax", include_self=False
        )
        exponential = (b - largest[self.child]).exp()
        total = b.new_zeros(self.children).index_add(0, self.child, exponential)
        return (exponential / total[self.child]).unsqueeze(-1)

    def sum_into_parents(
        self, c: Tensor, u_hat: Tensor, node_function: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        message = c * u_hat
        s = message.new_zeros(self.parents, message.shape[1]).index_add(0, self.parent, message)
        return s, node_function(s)

    def agreement(self, u_hat: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("ed,ed->e", u_hat, self.expand_to_edges(v)).unsqueeze(-1)

    def expand_to_edges(self, v: Tensor) -> Tensor:
        return v.index_select(0, self.parent)
