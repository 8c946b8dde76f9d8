"""Routing's message passing as DGL's user-defined functions: the definition, literally."""

from collections.abc import Callable

import torch
from torch import Tensor

from graphcaps._dgl import dgl, softmax_over_parents, why_not_on


class UdfEngine:
    """Edge softmax, a message and a reduce function, a node function and an edge function."""

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
        graph = self.graph.local_var()
        graph.edata["c"], graph.edata["u_hat"] = c, u_hat
        # for parents that no message reaches; a sum over no votes, so that gradients know of it
        nothing = u_hat[:0].sum(dim=0)
        graph.nodes["parent"].data["s"] = nothing.repeat(graph.num_nodes("parent"), 1)

        def message(edges):
            return {"c": edges.data["c"].squeeze(-1), "u_hat": edges.data["u_hat"]}

        def reduce(nodes):  # c · û summed in one product: a mailbox of c · û costs a pass more
            c, u_hat = nodes.mailbox["c"], nodes.mailbox["u_hat"]
            return {"s": torch.einsum("ji,jid->jd", c, u_hat)}

        def apply(nodes):
            return {"v": node_function(nodes.data["s"])}

        if graph.num_edges():  # without edges DGL warns and does nothing
            graph.update_all(message, reduce)
        graph.apply_nodes(apply, ntype="parent")
        return graph.nodes["parent"].data["s"], graph.nodes["parent"].data["v"]

    def agreement(self, u_hat: Tensor, v: Tensor) -> Tensor:
        def agree(edges):
            agreement = torch.einsum("ed,ed->e", edges.data["u_hat"], edges.dst["v"])
            return {"a": agreement.unsqueeze(-1)}

        if not len(u_hat):
            return u_hat.sum(dim=-1, keepdim=True)
        graph = self.graph.local_var()
        graph.edata["u_hat"], graph.nodes["parent"].data["v"] = u_hat, v
        graph.apply_edges(agree)
        return graph.edata["a"]

    def expand_to_edges(self, v: Tensor) -> Tensor:
        if not self.graph.num_edges():
            return v[:0]
        graph = self.graph.local_var()
        graph.nodes["parent"].data["v"] = v
        graph.apply_edges(lambda edges: {"v": edges.dst["v"]})
        return graph.edata["v"]
