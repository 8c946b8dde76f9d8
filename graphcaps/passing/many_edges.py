"""DGL's operations over the edges of each child, accurate even if a child has many parents."""

from typing import Any

import torch
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.graph import batch_graph, made_to_be_kept, routing_graph
from graphcaps.structure import Structure


class EdgesOfChildren:
    """Softmax over the edges that compete, and copies of children's features to their edges.

    DGL adds the edges of a child one by one. With thousands of parents the sum of exponentials in
    float32 is then off in its fifth digit, which scales all c of the child by the same factor. They
    are therefore divided by their own sum, which is taken in parts.

    If the edges that compete are not those of each child, the softmax is taken on a second graph,
    whose children are the competitions.

    Attributes:
        many: whether any child has so many edges that sums over them are taken in parts.
    """

    def __init__(self, structure: Structure, samples: int, graph: dgl.DGLGraph) -> None:
        self.structure, self.samples = structure, samples
        self.device = graph.device
        self.by_child = structure.groups("child", self.device)
        self.by_competition = structure.groups("competition", self.device)
        self.many = self.by_child.part is not None
        self.competing = graph if structure.by_child else self._graph_of_competitions(leak=False)
        self.leaky: dgl.DGLGraph | None = None

    def expand(self, a: Tensor) -> Tensor:
        """Copy each child's feature to its edges; the gradient is summed in parts."""
        by_sample = a.reshape(self.samples, self.by_child.count, a.shape[1])
        return self.by_child.expand(by_sample, dim=1).flatten(0, 1)

    def softmax(self, b: Tensor, leak: bool) -> Tensor:
        """`c_e = exp b_e / Σ exp b` over the edges that compete: `[B·E, 1]` to `[B·E, 1]`.

        Autograd raises RuntimeError for second derivatives on the CPU, where DGL's would be wrong
        without an error.
        """
        groups, graph = self.by_competition, self.competing
        edges, leaks = len(groups.index), groups.count if leak else 0
        if leak:
            if self.leaky is None:
                self.leaky = self._graph_of_competitions(leak=True)
            graph = self.leaky
            zeros = b.new_zeros(self.samples, leaks, 1)
            b = torch.cat([b.reshape(self.samples, edges, 1), zeros], dim=1).flatten(0, 1)
        # DGL's default, norm_by="dst", would normalise over the children of a parent
        c = dgl.ops.edge_softmax(graph, b, norm_by="src")
        if c.device.type == "cpu":
            c = _FirstDerivative.apply(c)
        by_sample = c.reshape(self.samples, edges + leaks, 1)
        c = by_sample[:, :edges]
        if groups.part is not None:
            total = groups.sum(c, dim=1)
            if leak:
                total = total + by_sample[:, edges:]
            c = c / groups.expand(total, dim=1)
        return c.flatten(0, 1)

    def _graph_of_competitions(self, leak: bool) -> dgl.DGLGraph:
        """A batched graph from competitions to parents; leaks follow the edges of each sample."""
        structure = self.structure
        with made_to_be_kept():
            below, above = structure.competition, structure.parent
            if leak:
                below = torch.cat([below, torch.arange(structure.competitions)])
                to_nothing = torch.full((structure.competitions,), structure.parents)
                above = torch.cat([above, to_nothing])
            graph = routing_graph(
                below,
                above,
                children=structure.competitions,
                parents=structure.parents + int(leak),
            )
            return batch_graph(graph, self.samples).to(self.device)


class _FirstDerivative(torch.autograd.Function):
    """The identity, whose backward raises RuntimeError if second derivatives are requested."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "DGL's edge softmax has no second derivatives on the CPU; use engine='scatter'"
            )
        return gradient
