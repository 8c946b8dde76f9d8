"""Traces: the iterations of a routing, with entropy, parse tree and graphs for inspection."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx
import torch
from torch import Tensor

from graphcaps import functional
from graphcaps._dgl import dgl
from graphcaps.routing.base import Iteration


@dataclass(frozen=True)
class Trace:
    """A record of all iterations of a routing, on the edges and parents of a graph.

    Iterations are numbered from 0 to R − 1. Gradients flow through all tensors, so that a loss can
    use them; record the trace under `torch.no_grad()` if you do not need them. A ragged batch is
    one sample, whose graph is the whole batch; `dgl.unbatch` splits the result of `graph`.

    Attributes:
        structure: the graph of one sample.
        u_hat: votes, `[B, E, D]`.
        b: logits at the start of each iteration, `[R, B, E]`.
        c: coupling, `[R, B, E]`.
        s: weighted sums, `[R, B, J, D]`.
        v: outputs, `[R, B, J, D]`.
        a: activations of the parents, `[R, B, J]`; for a routing without them, the lengths |v|.

    >>> import torch, graphcaps as gc
    >>> layer = gc.CapsuleLayer(gc.complete_graph(6, 3), child_dim=4, parent_dim=5, iterations=2)
    >>> v, trace = layer(torch.rand(7, 6, 4), return_trace=True)
    >>> trace.c.shape, trace.entropy().shape
    (torch.Size([2, 7, 18]), torch.Size([2, 7, 6]))
    >>> trace.graph(sample=0, iteration=1).edata["c"].shape
    torch.Size([18, 1])
    """

    structure: dgl.DGLGraph
    u_hat: Tensor
    b: Tensor
    c: Tensor
    s: Tensor
    v: Tensor
    a: Tensor

    @classmethod
    def of(
        cls, structure: dgl.DGLGraph, samples: int, u_hat: Tensor, iterations: Sequence[Iteration]
    ) -> "Trace":
        """Create a trace from the iterations of an algorithm on a batch.

        Args:
            structure: the graph of one sample.
            samples: number of samples in the batch, B.
            u_hat: votes of the batch, `[B·E, D]`.
            iterations: all iterations that the algorithm yielded.
        """

        def stacked(features: Iterable[Tensor | None], *size: int) -> Tensor:
            return torch.stack([x for x in features if x is not None]).view(len(iterations), *size)

        edges, parents = structure.num_edges(), structure.num_nodes("parent")
        dim = iterations[-1].v.shape[1]  # votes may have more columns, for their logits
        v = stacked((i.v for i in iterations), samples, parents, dim)
        without = any(i.a is None for i in iterations)
        return cls(
            structure=structure,
            u_hat=u_hat[:, :dim].reshape(samples, edges, dim),
            b=stacked((i.b for i in iterations), samples, edges),
            c=stacked((i.c for i in iterations), samples, edges),
            s=stacked((i.s[:, :dim] for i in iterations), samples, parents, dim),
            v=v,
            a=functional.length(v)
            if without
            else stacked((i.a for i in iterations), samples, parents),
        )

    def entropy(self) -> Tensor:
        """The entropy of each child's coupling, `−Σ_j c_ij ln c_ij` in nats.

        Returns:
            `[R, B, I]`, from 0 (a single parent) to ln of the child's number of parents.
        """
        rounds, samples, _ = self.c.shape
        nothing = self.c.new_zeros(rounds, samples, self.structure.num_nodes("child"))
        return nothing.index_add(2, self._child, torch.special.entr(self.c))

    def effective_parents(self) -> Tensor:
        """The effective number of parents of each child, `exp(entropy)`, `[R, B, I]`."""
        return self.entropy().exp()

    def agreement(self) -> Tensor:
        """The agreement of each vote with its parent's output, `û_ij · v_j`, `[R, B, E]`."""
        return (self.u_hat * self.v[:, :, self._parent]).sum(dim=-1)

    def contributions(self) -> Tensor:
        """The signed contribution of each child to the length of a parent's weighted sum.

        With `t_j = Σ_i c_ij û_ij`, which is s_j of dynamic and uniform routing, the contribution
        of an edge is `c_ij û_ij · t_j / |t_j|`. A parent's contributions add up to |t_j|; those of
        children whose votes point away from the sum are negative.

        Returns:
            `[R, B, E]`.
        """
        votes = self.c.unsqueeze(-1) * self.u_hat
        total = torch.zeros_like(self.v).index_add(2, self._parent, votes)
        along = torch.nn.functional.normalize(total, dim=-1, eps=torch.finfo(total.dtype).tiny)
        return (votes * along[:, :, self._parent]).sum(dim=-1)

    def strongest_parent(self) -> Tensor:
        """The parent to which each child couples most strongly: the parse tree.

        Returns:
            Indices of parents, int64 `[R, B, I]`; the lowest one in a tie, −1 without parents.
        """
        rounds, samples, edges = self.c.shape
        none = self.structure.num_nodes("parent")
        child = self._child.expand(rounds, samples, edges)
        size = (rounds, samples, self.structure.num_nodes("child"))
        most = self.c.new_zeros(size).scatter_reduce(2, child, self.c, "amax", include_self=False)
        candidate = torch.where(self.c == most.gather(2, child), self._parent, none)
        lowest = candidate.new_full(size, none).scatter_reduce(2, child, candidate, "amin")
        return torch.where(lowest == none, -1, lowest)

    def strongest_children(self, sample: int, iteration: int, count: int) -> list[int]:
        """The children with the largest coupling to any parent, sorted by index.

        Args:
            sample: from 0 to B − 1.
            iteration: from 0 to R − 1.
            count: number of children; all children if there are fewer.
        """
        children = self.structure.num_nodes("child")
        c = self.c[iteration, sample]
        most = c.new_zeros(children).scatter_reduce(0, self._child, c, "amax")
        return sorted(most.topk(min(count, children)).indices.tolist())

    def children_by_parent(
        self, sample: int, iteration: int, children: Sequence[int] | None = None
    ) -> list[int]:
        """Children sorted by the parents that they couple to, so that few edges cross in a figure.

        The sort key is the mean index of a child's parents, weighted by the coupling.

        Args:
            sample: from 0 to B − 1.
            iteration: from 0 to R − 1.
            children: the children to sort, such as the `strongest_children`; by default all.
        """
        c = self.c[iteration, sample]
        place = c.new_zeros(self.structure.num_nodes("child"))
        total = place.index_add(0, self._child, c).clamp_min(torch.finfo(c.dtype).tiny)
        place = place.index_add(0, self._child, c * self._parent) / total
        shown = range(len(place)) if children is None else children
        return sorted(shown, key=place.tolist().__getitem__)

    def graph(self, sample: int, iteration: int) -> dgl.DGLGraph:
        """One sample at one iteration as a DGL graph.

        Args:
            sample: from 0 to B − 1.
            iteration: from 0 to R − 1.

        Returns:
            A new graph with edge features `b`, `c` `[E, 1]` and `u_hat` `[E, D]`, and parent
            features `s`, `v` `[J, D]` and `a` `[J, 1]`.
        """
        graph = self.structure.local_var().to(self.c.device)
        graph.edata["b"] = self.b[iteration, sample].unsqueeze(-1)
        graph.edata["c"] = self.c[iteration, sample].unsqueeze(-1)
        graph.edata["u_hat"] = self.u_hat[sample]
        graph.nodes["parent"].data["s"] = self.s[iteration, sample]
        graph.nodes["parent"].data["v"] = self.v[iteration, sample]
        graph.nodes["parent"].data["a"] = self.a[iteration, sample].unsqueeze(-1)
        return graph

    def networkx(
        self,
        sample: int,
        iteration: int,
        *,
        groups: Sequence[int] | Tensor | None = None,
        children: Sequence[int] | None = None,
    ) -> networkx.MultiGraph:
        """One sample at one iteration as a bipartite networkx graph, ready to be drawn.

        Args:
            sample: from 0 to B − 1.
            iteration: from 0 to R − 1.
            groups: the group of each child, `[I]`, integers from 0. Each group becomes one node,
                whose edges have the mean coupling of its children; the 1152 children of the
                paper's net, for example, are too many to draw.
            children: the children to include, in this order from left to right, such as the
                `strongest_children` or the `children_by_parent`.

        Returns:
            Nodes `("child", i)` below and `("parent", j)` above, with `bipartite` 0 and 1 and a
            position `pos` (x from 0 to 1, y 0 or 1). Children have `size`, the number of children
            in the node; parents have `length` |v_j|; edges have the coupling as `weight`.

        Raises:
            ValueError: `groups` does not have one group for each child, or both `groups` and
                `children` are given.
        """
        if groups is not None and children is not None:
            raise ValueError("choose groups of all children, or some children; got both")
        parents = self.structure.num_nodes("parent")
        child, parent, weight = self._child, self._parent, self.c[iteration, sample]
        sizes = torch.ones(self.structure.num_nodes("child"), dtype=torch.int64)
        if groups is not None:
            group = torch.as_tensor(groups).to(child)
            if group.shape != sizes.shape:
                raise ValueError(
                    f"expected one group for each of {len(sizes)} children; got {list(group.shape)}"
                )
            child, parent, weight, sizes = _merge(child, parent, weight, group)
        shown = range(len(sizes)) if children is None else children
        kept = torch.isin(child, torch.tensor(list(shown)).to(child))
        child, parent, weight = child[kept], parent[kept], weight[kept]
        drawn = networkx.MultiGraph()
        for place, i in enumerate(shown):
            pos = ((place + 0.5) / len(shown), 0)
            drawn.add_node(("child", i), bipartite=0, pos=pos, size=int(sizes[i]))
        for j, length in enumerate(self.v[iteration, sample].norm(dim=-1).tolist()):
            pos = ((j + 0.5) / parents, 1)
            drawn.add_node(("parent", j), bipartite=1, pos=pos, length=length)
        for i, j, c in zip(child.tolist(), parent.tolist(), weight.tolist(), strict=True):
            drawn.add_edge(("child", i), ("parent", j), weight=c)
        return drawn

    @property
    def _child(self) -> Tensor:
        return self.structure.edges()[0].to(self.c.device, torch.int64)

    @property
    def _parent(self) -> Tensor:
        return self.structure.edges()[1].to(self.c.device, torch.int64)


def _merge(
    child: Tensor, parent: Tensor, weight: Tensor, group: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The edges of groups of children with their mean coupling, and the sizes of the groups."""
    sizes = torch.bincount(group)
    ends, edge = torch.stack([group[child], parent]).unique(dim=1, return_inverse=True)
    total = weight.new_zeros(ends.shape[1]).index_add(0, edge, weight)
    return ends[0], ends[1], total / sizes[ends[0]], sizes
