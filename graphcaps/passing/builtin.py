"""Message passing with DGL's sparse kernels, without mailboxes or features stored on the graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from graphcaps._dgl import dgl, why_not_on
from graphcaps.graph import VOTES, batch_graph
from graphcaps.passing.many_edges import EdgesOfChildren
from graphcaps.structure import Structure


class BuiltinEngine:
    """Edge softmax, a sparse sum over edges (g-SpMM) and a sampled dot product (g-SDDMM).

    DGL adds the edges of a parent one by one, which loses precision if there are many. In that case
    they lead to *parts* of the parent, and a second graph connects the parts to the parents.
    """

    def __init__(self, structure: Structure, samples: int, device: torch.device) -> None:
        self.structure, self.samples = structure, samples
        parts = structure.groups("parent", torch.device("cpu"))
        self.parts: dgl.DGLGraph | None = None
        if parts.part is None or parts.owner is None:
            graph = structure.graph
        else:
            graph = _bipartite(structure.child, parts.part, structure.children, len(parts.owner))
            number = torch.arange(len(parts.owner))
            to_parents = _bipartite(number, parts.owner, len(number), structure.parents)
            self.parts = batch_graph(to_parents, samples).to(device)
        self.graph = batch_graph(graph, samples).to(device)
        self.of_children = EdgesOfChildren(structure, samples, self.graph)

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        return why_not_on(device)

    def softmax_over_parents(self, b: Tensor, leak: bool = False) -> Tensor:
        return self.of_children.softmax(b, leak)

    def sum_into_parents(self, w: Tensor, x: Tensor) -> Tensor:
        s = dgl.ops.copy_e_sum(self.graph, w * x)
        return s if self.parts is None else dgl.ops.copy_u_sum(self.parts, s)

    def agreement(self, x: Tensor, p: Tensor) -> Tensor:
        return dgl.ops.e_dot_v(self.graph, x, self._to_parts(p))

    def expand_from_parents(self, v: Tensor) -> Tensor:
        return dgl.ops.copy_v(self.graph, self._to_parts(v))

    def expand_from_children(self, a: Tensor) -> Tensor:
        if self.of_children.many:
            return self.of_children.expand(a)
        return dgl.ops.copy_u(self.graph, a)

    def update_parents(
        self, function: Callable[..., tuple[Tensor, ...]], *features: Tensor
    ) -> tuple[Tensor, ...]:
        return function(*features)

    def _to_parts(self, v: Tensor) -> Tensor:
        return v if self.parts is None else dgl.ops.copy_v(self.parts, v)


def _bipartite(below: Tensor, above: Tensor, count_below: int, count_above: int) -> dgl.DGLGraph:
    sizes = {"child": count_below, "parent": count_above}
    return dgl.heterograph({VOTES: (below, above)}, sizes, idtype=torch.int32)
