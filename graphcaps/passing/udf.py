"""Message passing with DGL's user-defined functions, which follow the definition of routing."""

from collections.abc import Callable

import torch
from torch import Tensor

from graphcaps._dgl import why_not_on
from graphcaps.graph import batch_graph
from graphcaps.passing.many_edges import EdgesOfChildren
from graphcaps.structure import Structure

MOST_IN_A_PRODUCT = 4096  # terms of a sum taken by einsum, which is less precise than torch.sum


class UdfEngine:
    """Edge softmax, a message and a reduce function, node functions and edge functions."""

    def __init__(self, structure: Structure, samples: int, device: torch.device) -> None:
        self.structure, self.samples = structure, samples
        self.graph = batch_graph(structure.graph, samples).to(device)
        self.of_children = EdgesOfChildren(structure, samples, self.graph)

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        return why_not_on(device)

    def softmax_over_parents(self, b: Tensor, leak: bool = False) -> Tensor:
        return self.of_children.softmax(b, leak)

    def sum_into_parents(self, w: Tensor, x: Tensor) -> Tensor:
        graph = self.graph.local_var()
        graph.edata["w"], graph.edata["x"] = w, x
        # for parents without messages: a sum over no edges, to which autograd can connect
        nothing = x[:0].sum(dim=0)
        graph.nodes["parent"].data["s"] = nothing.repeat(graph.num_nodes("parent"), 1)

        def message(edges):
            return {"w": edges.data["w"].squeeze(-1), "x": edges.data["x"]}

        # one einsum multiplies and sums, which saves a pass over a mailbox of w · x
        def reduce(nodes):
            w, x = nodes.mailbox["w"], nodes.mailbox["x"]
            if w.shape[1] > MOST_IN_A_PRODUCT:
                return {"s": (w.unsqueeze(-1) * x).sum(dim=1)}
            return {"s": torch.einsum("ji,jid->jd", w, x)}

        if graph.num_edges():  # without edges, DGL warns and does nothing
            graph.update_all(message, reduce)
        return graph.nodes["parent"].data["s"]

    def agreement(self, x: Tensor, p: Tensor) -> Tensor:
        def agree(edges):
            return {"b": torch.einsum("ed,ed->e", edges.data["x"], edges.dst["p"]).unsqueeze(-1)}

        if not len(x):
            return x.sum(dim=-1, keepdim=True)
        graph = self.graph.local_var()
        graph.edata["x"], graph.nodes["parent"].data["p"] = x, p
        graph.apply_edges(agree)
        return graph.edata["b"]

    def expand_from_parents(self, v: Tensor) -> Tensor:
        if not self.graph.num_edges():
            return v[:0]
        graph = self.graph.local_var()
        graph.nodes["parent"].data["v"] = v
        graph.apply_edges(lambda edges: {"v": edges.dst["v"]})
        return graph.edata["v"]

    def expand_from_children(self, a: Tensor) -> Tensor:
        if not self.graph.num_edges():
            return a[:0]
        if self.of_children.many:
            return self.of_children.expand(a)
        graph = self.graph.local_var()
        graph.nodes["child"].data["a"] = a
        graph.apply_edges(lambda edges: {"a": edges.src["a"]})
        return graph.edata["a"]

    def update_parents(
        self, function: Callable[..., tuple[Tensor, ...]], *features: Tensor
    ) -> tuple[Tensor, ...]:
        if not self.graph.num_nodes("parent"):  # without nodes, DGL does not call the function
            return function(*features)
        graph = self.graph.local_var()
        names = [f"feature {number}" for number in range(len(features))]
        for name, feature in zip(names, features, strict=True):
            graph.nodes["parent"].data[name] = feature

        def apply(nodes):
            new = function(*(nodes.data[name] for name in names))
            return {f"new {number}": feature for number, feature in enumerate(new)}

        graph.apply_nodes(apply, ntype="parent")
        made = graph.nodes["parent"].data
        return tuple(made[name] for name in made if name.startswith("new "))
