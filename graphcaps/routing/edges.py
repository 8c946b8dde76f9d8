"""The interface of routings to the edges of a batch: one operation, the pass, on every engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from graphcaps import kernels
from graphcaps.passing import MessagePassing
from graphcaps.structure import Structure


class Sums(NamedTuple):
    """The result of a pass: sums at the parents, and the logits and coupling behind them.

    Attributes:
        N: sum of the weights w, `[B·J, 1]`.
        S: sum of w times y, the vote minus the reference point, `[B·J, D]`.
        Q: sum of w times y²; `[B·J, 0]` unless requested.
        r: the reference point, `[B·J, D]`; None for 0.
        b, c: logits and coupling, `[B·E, 1]`; None where no votes are stored.
    """

    N: Tensor
    S: Tensor
    Q: Tensor
    r: Tensor | None
    b: Tensor | None
    c: Tensor | None


class Edges(ABC):
    """The edges of a batch, between the children's poses and the parents that a routing computes.

    Features of parents are `[B·J, ·]`, those of children `[B·I, ·]`, with the samples of a batch in
    order. A ragged batch is one sample.

    Attributes:
        samples, children, parents: B, I, J.
        dim: length of a vote.
        dtype, device: dtype and device of the votes; float32 in a layer with a 16-bit dtype.
    """

    def __init__(
        self, structure: Structure, samples: int, dim: int, like: Tensor, a: Tensor | None
    ) -> None:
        self._structure = structure
        self.samples, self.children, self.parents = samples, structure.children, structure.parents
        self.dim = dim
        self.dtype, self.device = like.dtype, like.device
        self._a = a

    @property
    def a(self) -> Tensor:
        """Activations of the children, `[B·I, 1]`; 1 if the layer was given none."""
        if self._a is None:
            size = (self.samples * self.children, 1)
            self._a = torch.ones(size, dtype=self.dtype, device=self.device)
        return self._a

    @abstractmethod
    def couple(
        self,
        *,
        k: Tensor | None = None,
        p: Tensor | None = None,
        q: Tensor | None = None,
        r: Tensor | None = None,
        a: Tensor | None = None,
        prior: Tensor | None = None,
        beta: Tensor | None = None,
        leak: bool = False,
        squares: bool = False,
        detach_coupling: bool = False,
    ) -> Sums:
        """One pass over the edges: sums of each parent's votes, weighted by the coupling.

        With `y_e = û_e − r_j`, the vote relative to the reference point of its parent:

            b_e = prior_m + k_j + p_j·y_e + q_j·y_e²     (y² elementwise)
            c_e = softmax of b over the edges that compete, those of the same child
            w_e = a_i (c_e + beta_m)
            N_j = Σ w_e,   S_j = Σ w_e y_e,   Q_j = Σ w_e y_e²

        Absent terms count as 0, a as 1. Without prior, k, p and q the logits are equal, and each
        child couples equally to all its parents. The sums of a parent without children are 0. The
        graph can define that other edges compete, see `routing_graph`.

        Args:
            k: `[B·J, 1]`.
            p: `[B·J, D]`.
            q: `[B·J, D]`.
            r: `[B·J, D]`. If r is near the mean of the votes, the variance `Q/N − (S/N)²` does not
                lose precision by cancellation.
            a: weights of the children, `[B·I, 1]`, often `edges.a`.
            prior: one number for each matrix, `[M]`.
            beta: one number for each matrix, `[M]`.
            leak: let one more edge with logit 0 compete with those of each child.
            squares: also compute Q.
            detach_coupling: stop gradients at c.

        Returns:
            The sums; gradients flow to the votes and to all arguments.
        """

    @abstractmethod
    def detach(self) -> "Edges":
        """The same edges with detached votes."""

    @abstractmethod
    def update(
        self, function: Callable[..., tuple[Tensor, ...]], *features: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply a function of parents' features, as a node function on engine `"udf"`.

        Args:
            function: takes features `[B·J, ·]`, returns a tuple of new ones.
            features: its arguments.
        """

    def of_type(self, x: Tensor) -> Tensor:
        """Copy a parameter for each type of parent to the parents: `[T, …]` to `[B·J, …]`.

        One number for each type, `[T]`, becomes `[B·J, 1]`.

        Raises:
            ValueError: the graph has parents of more types.
        """
        if self._structure.types > len(x):
            raise ValueError(
                f"the graph has parents of {self._structure.types} types, but the routing has "
                f"parameters for {len(x)}; give the graph's parents a type, see routing_graph"
            )
        x = (x.unsqueeze(-1) if x.dim() == 1 else x).to(self.dtype)
        at_parents = x.index_select(0, self._structure.numbers("parent_type", x.device))
        return at_parents.repeat(self.samples, *[1] * (x.dim() - 1))

    def total_over_parents(self, x: Tensor) -> Tensor:
        """The sum over all parents of the same graph, at each of them: `[B·J, D]` to the same."""
        graph = self._structure.numbers("graph_of_parent", x.device)
        by_sample = x.unflatten(0, (self.samples, self.parents))
        total = x.new_zeros(self.samples, self._structure.graphs, x.shape[1])
        return total.index_add(1, graph, by_sample).index_select(1, graph).flatten(0, 1)

    def degree(self) -> Tensor:
        """Number of edges that compete with each edge of a child, itself included, `[B·I, 1]`.

        It is the number of the child's parents, unless the graph defines another competition.

        Raises:
            ValueError: the number differs between the edges of a child.
        """
        degree = self._structure.degree(self.device).to(self.dtype)
        return degree.unsqueeze(-1).repeat(self.samples, 1)

    def zeros_of_parents(self) -> Tensor:
        """Zeros for a feature of parents that is as long as a vote, `[B·J, dim]`."""
        size = (self.samples * self.parents, self.dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)


class EdgesWithVotes(Edges):
    """Edges that store logits, coupling and votes, on an engine of `graphcaps.passing`.

    Args:
        passing: an engine, bound to the batched graph.
        u_hat: votes, `[B·E, D]`.
        a: activations of the children, `[B·I, 1]`.

    Raises:
        ValueError: not one vote for each edge.
    """

    def __init__(self, passing: MessagePassing, u_hat: Tensor, a: Tensor | None = None) -> None:
        edges = passing.samples * passing.structure.edges
        if u_hat.dim() != 2 or u_hat.shape[0] != edges:
            raise ValueError(
                f"expected one vote for each of the {edges} edges, [{edges}, D]; "
                f"got {list(u_hat.shape)}"
            )
        super().__init__(passing.structure, passing.samples, u_hat.shape[1], u_hat, a)
        self.passing = passing
        self.u_hat = u_hat

    def couple(
        self,
        *,
        k: Tensor | None = None,
        p: Tensor | None = None,
        q: Tensor | None = None,
        r: Tensor | None = None,
        a: Tensor | None = None,
        prior: Tensor | None = None,
        beta: Tensor | None = None,
        leak: bool = False,
        squares: bool = False,
        detach_coupling: bool = False,
    ) -> Sums:
        """See `Edges.couple`."""
        passing, parents = self.passing, self.samples * self.parents
        y = self.u_hat if r is None else self.u_hat - passing.expand_from_parents(r)
        terms = []
        if prior is not None:
            terms.append(self._of_kind(prior))
        if k is not None:
            terms.append(passing.expand_from_parents(k))
        if p is not None:
            terms.append(passing.agreement(y, p))
        if q is not None:
            terms.append(passing.agreement(y.square(), q))
        if terms:
            b = sum(terms[1:], terms[0])
            c = passing.softmax_over_parents(b, leak)
        else:
            b = y.new_zeros(y.shape[0], 1)
            rivals = self._structure.rivals(y.device).to(self.dtype)
            c = (1 / (rivals + int(leak))).unsqueeze(-1).repeat(self.samples, 1)
        w = c = c.detach() if detach_coupling else c
        if beta is not None:
            w = w + self._of_kind(beta)
        if a is not None:
            w = w * passing.expand_from_children(a)
        return Sums(
            N=passing.sum_into_parents(w, torch.ones_like(w)),
            S=passing.sum_into_parents(w, y),
            Q=passing.sum_into_parents(w, y.square()) if squares else y.new_zeros(parents, 0),
            r=r,
            b=b,
            c=c,
        )

    def detach(self) -> "EdgesWithVotes":
        """See `Edges.detach`."""
        return EdgesWithVotes(self.passing, self.u_hat.detach(), self._a)

    def update(
        self, function: Callable[..., tuple[Tensor, ...]], *features: Tensor
    ) -> tuple[Tensor, ...]:
        """See `Edges.update`."""
        return self.passing.update_parents(function, *features)

    def _of_kind(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype).unsqueeze(-1)
        on_edges = self._structure.groups("kind", x.device).expand(x, dim=0)
        return on_edges.repeat(self.samples, 1)


class EdgesWithoutVotes(Edges):
    """Edges whose votes are recomputed by a compiled kernel where they are needed, never stored.

    Args:
        structure: the graph of one sample.
        u: poses, `[B, I, P·K]`.
        weight: matrices, `[M, K, D]`.
        rows: P, rows of a pose.
        a: activations of the children, `[B·I, 1]`.
    """

    def __init__(
        self, structure: Structure, u: Tensor, weight: Tensor, rows: int, a: Tensor | None = None
    ) -> None:
        super().__init__(structure, u.shape[0], rows * weight.shape[2], u, a)
        self.u, self.weight, self.rows = u, weight, rows
        self.sorted = self.prepare(structure, u.device)

    @staticmethod
    def prepare(structure: Structure, device: torch.device) -> kernels.Edges | kernels.TritonEdges:
        """The kernel's data for a graph on a device, cached by the structure."""

        def sort() -> kernels.Edges | kernels.TritonEdges:
            return kernels.prepare(structure.graph, structure.kinds, device)

        return structure.keep(("sorted", device), sort)

    def couple(
        self,
        *,
        k: Tensor | None = None,
        p: Tensor | None = None,
        q: Tensor | None = None,
        r: Tensor | None = None,
        a: Tensor | None = None,
        prior: Tensor | None = None,
        beta: Tensor | None = None,
        leak: bool = False,
        squares: bool = False,
        detach_coupling: bool = False,
    ) -> Sums:
        """See `Edges.couple`."""
        a = None if a is None else a.reshape(self.samples, self.children)
        votes = kernels.Votes(self.u, self.weight, self.sorted, a, self.rows)
        N, S, Q = votes.couple(
            k=None if k is None else k.reshape(self.samples, self.parents),
            p=self._by_sample(p),
            q=self._by_sample(q),
            r=self._by_sample(r),
            prior=None if prior is None else prior.to(self.u),
            beta=None if beta is None else beta.to(self.u),
            leak=leak,
            squares=squares,
            detach_coupling=detach_coupling,
        )
        return Sums(
            N=N.reshape(-1, 1),
            S=S.flatten(0, 1),
            Q=S.new_zeros(self.samples * self.parents, 0) if Q is None else Q.flatten(0, 1),
            r=r,
            b=None,
            c=None,
        )

    def route_dynamically(
        self, iterations: int, gradients: Literal["all", "last"] = "all"
    ) -> Tensor:
        """Dynamic routing as in the paper, by a dedicated kernel: v, `[B·J, D]`."""
        v = kernels.routed(self.u, self.weight, self.sorted, iterations, gradients)
        return v.flatten(0, 1)

    def detach(self) -> "EdgesWithoutVotes":
        """See `Edges.detach`."""
        return EdgesWithoutVotes(
            self._structure, self.u.detach(), self.weight.detach(), self.rows, self._a
        )

    def update(
        self, function: Callable[..., tuple[Tensor, ...]], *features: Tensor
    ) -> tuple[Tensor, ...]:
        """See `Edges.update`."""
        return function(*features)

    def _by_sample(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(self.samples, self.parents, self.dim)
