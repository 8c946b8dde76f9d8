"""The base class of routings: an algorithm over the edges of a batch, with parameters."""

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from graphcaps.routing.edges import Edges, EdgesWithoutVotes, Sums


class Iteration(NamedTuple):
    """The result of one iteration of a routing.

    Attributes:
        sums: sums of the pass over the edges; if votes are stored, also its logits and coupling.
        v: poses of the parents, `[B·J, D]`.
        a: their activations, `[B·J, 1]`; None for a routing without activations.

    >>> import torch, graphcaps as gc
    >>> passing = gc.bind(gc.complete_graph(children=6, parents=3))
    >>> first, *_ = gc.dynamic_routing(passing, torch.randn(18, 4))
    >>> first.c.shape, first.v.shape
    (torch.Size([18, 1]), torch.Size([3, 4]))
    """

    sums: Sums
    v: Tensor
    a: Tensor | None = None

    @property
    def b(self) -> Tensor | None:
        """Logits that the iteration started from, `[B·E, 1]`."""
        return self.sums.b

    @property
    def c(self) -> Tensor | None:
        """Coupling, `[B·E, 1]`."""
        return self.sums.c

    @property
    def s(self) -> Tensor:
        """Weighted sum of the votes, `[B·J, D]`."""
        return self.sums.S if self.sums.r is None else self.sums.S + self.sums.N * self.sums.r


class Sizes(NamedTuple):
    """Sizes of the layer that a routing works in.

    Attributes:
        kinds: number of matrices, M.
        types: number of types of parents, T.
        rows: rows of a pose, P.
        parent_dim: numbers in the pose of a parent.
    """

    kinds: int
    types: int
    rows: int
    parent_dim: int


class Routing(nn.Module):
    """An algorithm that computes parents from votes.

    A custom routing implements `steps` with `Edges.couple`, and then runs on every graph and every
    engine without further code. It creates its parameters in `build`, and keeps no state between
    calls.

    >>> import torch, graphcaps as gc
    >>> class Mean(gc.Routing):
    ...     def steps(self, edges):
    ...         sums = edges.couple()
    ...         yield gc.Iteration(sums, sums.S / sums.N)
    >>> layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, routing=Mean())
    >>> layer(torch.rand(2, 6, 4)).shape
    torch.Size([2, 3, 5])
    """

    name: ClassVar[str]
    """Its name in `ROUTINGS`, for `CapsuleLayer` and the program."""

    activations: ClassVar[bool] = False
    """Whether it takes activations of the children and gives activations of the parents."""

    length_is_activation: ClassVar[bool] = True
    """Without activations: whether the length of a parent is its confidence, from 0 to 1."""

    loss: ClassVar[Literal["margin", "spread", "nll"]] = "margin"
    """The loss of classes that its parents are trained with, see `capsnet_loss`: spread where its
    activations tell classes apart by little, whatever their values; nll where they sum to one."""

    matrix_poses: ClassVar[bool] = False
    """Whether poses in its paper are 4×4 matrices, which is then the default of nets."""

    needs_votes: bool = False
    """Whether `steps` uses `edges.u_hat` or `edges.passing`, which engine `"fused"` lacks."""

    vote_columns: ClassVar[int] = 0
    """Columns of its matrices beyond the numbers in a row of a parent's pose."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def build_once(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        """Create the parameters for one layer, on the device of its matrices.

        Raises:
            ValueError: the routing already has the parameters of another layer.
        """
        if next(self.parameters(), None) is not None:
            raise ValueError(
                f"this {self.name} routing already has the parameters of another layer; "
                "create one for each layer"
            )
        self.build(sizes)
        self.to(device, dtype)

    def build(self, sizes: Sizes) -> None:
        """Create the parameters, with torch's default device and dtype; called by the layer.

        Args:
            sizes: sizes of the layer.

        Raises:
            ValueError: the routing does not support such a layer.
        """

    def reset_parameters(self, weight: Tensor) -> None:
        """Initialise the layer's matrices and the parameters.

        Args:
            weight: the layer's matrices, `[M, K, D]`, initialised from N(0, 0.1²) by default.
        """
        nn.init.normal_(weight, std=0.1)

    def steps(self, edges: Edges) -> Iterator[Iteration]:
        """The algorithm: passes over the edges, with updates of the parents between them.

        Args:
            edges: the edges of a batch.

        Yields:
            Every iteration; the poses and activations of the last are the result.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement steps")

    def dense(
        self, u_hat: Tensor, a: Tensor | None, mask: Tensor, by_edge: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """The same on dense votes, from `graphcaps.reference`, for tests and benchmarks.

        Args:
            u_hat: votes, `[B, I, J, D]`, including `vote_columns`.
            a: activations of the children, `[B, I]`.
            mask: which edges exist, bool `[I, J]`.
            by_edge: converts a parameter for each matrix, `[M]`, to `[I, J]`.

        Returns:
            Poses of the parents, `[B, J, D]`, the last coupling, `[B, I, J]`, and, if the routing
            has activations, those of the parents, `[B, J]`.

        Raises:
            NotImplementedError: this routing has no dense form.
        """
        raise NotImplementedError(f"there is no dense form of {self.name} routing")

    def by_kernel(self, edges: EdgesWithoutVotes) -> Tensor | None:
        """Poses of the parents from a dedicated kernel, `[B·J, D]`, or None without one."""
        return None


def check_at_least_1(name: str, number: int) -> None:
    """Raise ValueError for a number below 1."""
    if number < 1:
        raise ValueError(f"{name} must be at least 1; got {number}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose {' or '.join(choices)}")
