"""Routing's message passing as DGL's sparse kernels: no mailbox, no feature put on the graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from graphcaps._dgl import dgl, softmax_over_parents, why_not_on


class BuiltinEngine:
    """Edge softmax, a sparse sum over edges (g-SpMM) and a sampled dot product (g-SDDMM)."""

    def __init__(self, graph: dgl.DGLGraph, device: torch.device) -> None:
        self.graph = graph.to(device)
        self.edges = graph.num_edges()

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        return why_not_on(device)

    def softmax_over_parents(self, b: Tensor) -> Tensor:
        return softmax_over_parents(self.graph, b)

    def sum_into_parents(
        self, c: Tensor, u_hat: Tensor, node_function: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        s = dgl.ops.copy_e_sum(self.graph, c * u_hat)
        return s, node_function(s)

    def agreement(self, u_hat: Tensor, v: Tensor) -> Tensor:
        return dgl.ops.e_dot_v(self.graph, u_hat, v)

    def expand_to_edges(self, v: Tensor) -> Tensor:
        return dgl.ops.copy_v(self.graph, v)
