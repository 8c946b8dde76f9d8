"""What DGL computes over the edges of each child, exact for many parents as well."""

from typing import Any

import torch
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.graph import batch_graph, made_to_be_kept, routing_graph
from graphcaps.structure import Structure


class EdgesOfChildren:
    """The softmax over the edges that compete, and the features of children on their edges.

    DGL adds up a child's edges one after the other. With thousands of parents the sum of
    exponentials is then off in its fifth digit in float32, by the same factor in all of the
    child's c; so these are divided by their own sum, taken in parts.

    Where the edges of a child do not compete with each other, the softmax is that of a second
    graph, whose children are the competitions.

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
        """The child's feature on each of its edges, with a gradient that is summed in parts."""
        by_sample = a.reshape(self.samples, self.by_child.count, a.shape[1])
        return self.by_child.expand(by_sample, dim=1).flatten(0, 1)

    def softmax(self, b: Tensor, leak: bool) -> Tensor:
        """`c_e = exp b_e / Σ exp b` over the edges that compete: `[B·E, 1]` to `[B·E, 1]`.

        Asked for a second derivative on the CPU, DGL leaves out what it owes to this and says
        nothing; here autograd raises RuntimeError.
        """
        groups, graph = self.by_competition, self.competing
        edges, leaks = len(groups.index), groups.count if leak else 0
        if leak:
            if self.leaky is None:
                self.leaky = self._graph_of_competitions(leak=True)
            graph = self.leaky
            zeros = b.new_zeros(self.samples, leaks, 1)
            b = torch.cat([b.reshape(self.samples, edges, 1), zeros], dim=1).flatten(0, 1)
        # DGL's default, norm_by="dst", is over the children of a parent
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
        """From competitions to parents, batched; the leaks stand after the edges of a sample."""
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
    """Passes everything on, and raises when asked for a second derivative."""

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
