"""Operations of DGL over the edges of each child, accurate also for many parents."""

from typing import Any

import torch
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.graph import batch_graph, made_to_be_kept, routing_graph
from graphcaps.structure import Structure


class EdgesOfChildren:
    """The softmax over a child's edges, and its features on them.

    DGL adds up a child's edges one after the other. With thousands of parents the sum of
    exponentials is then off in its fifth digit in float32, by the same factor in all of the
    child's c; so these are divided by their own sum, taken in parts.

    Attributes:
        many: whether any child has so many edges that sums over them are taken in parts.
    """

    def __init__(self, structure: Structure, samples: int, graph: dgl.DGLGraph) -> None:
        self.structure, self.samples, self.graph = structure, samples, graph
        self.by_child = structure.groups("child", graph.device)
        self.many = self.by_child.part is not None
        self.leaky: dgl.DGLGraph | None = None

    def expand(self, a: Tensor) -> Tensor:
        """The child's feature on each of its edges, with a gradient that is summed in parts."""
        by_sample = a.reshape(self.samples, self.by_child.count, a.shape[1])
        return self.by_child.expand(by_sample, dim=1).flatten(0, 1)

    def softmax(self, b: Tensor, leak: bool) -> Tensor:
        """`c_e = exp b_e / Σ exp b` over the edges of the same child: `[B·E, 1]` to `[B·E, 1]`.

        DGL's second derivative of this on the CPU is silently wrong; here autograd raises
        RuntimeError.
        """
        edges, graph = len(self.by_child.index), self.graph
        leaks = self.by_child.count if leak else 0
        if leak:
            graph = self._graph_with_leaks()
            zeros = b.new_zeros(self.samples, leaks, 1)
            b = torch.cat([b.reshape(self.samples, edges, 1), zeros], dim=1).flatten(0, 1)
        # DGL's default, norm_by="dst", is over the children of a parent
        c = dgl.ops.edge_softmax(graph, b, norm_by="src")
        if c.device.type == "cpu":
            c = _FirstDerivative.apply(c)
        by_sample = c.reshape(self.samples, edges + leaks, 1)
        c = by_sample[:, :edges]
        if self.many:
            total = self.by_child.sum(c, dim=1)
            if leak:
                total = total + by_sample[:, edges:]
            c = c / self.by_child.expand(total, dim=1)
        return c.flatten(0, 1)

    def _graph_with_leaks(self) -> dgl.DGLGraph:
        """The batched graph with one edge more for each child, after the others of its sample."""
        if self.leaky is None:
            structure = self.structure
            with made_to_be_kept():
                child = torch.cat([structure.child, torch.arange(structure.children)])
                leak = torch.full((structure.children,), structure.parents)
                graph = routing_graph(
                    child,
                    torch.cat([structure.parent, leak]),
                    children=structure.children,
                    parents=structure.parents + 1,
                )
                self.leaky = batch_graph(graph, self.samples).to(self.graph.device)
        return self.leaky


class _FirstDerivative(torch.autograd.Function):
    """The identity, which raises when a second derivative is asked for."""

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
