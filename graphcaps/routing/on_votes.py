"""Dynamic and uniform routing as functions of votes, on a batched graph bound to an engine."""

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from graphcaps.passing import MessagePassing
from graphcaps.routing.base import Iteration
from graphcaps.routing.dynamic import DynamicRouting
from graphcaps.routing.edges import EdgesWithVotes
from graphcaps.routing.uniform import UniformRouting


def dynamic_routing(
    passing: MessagePassing,
    u_hat: Tensor,
    iterations: int = 3,
    gradients: Literal["all", "last"] = "all",
) -> Iterator[Iteration]:
    """Route votes by agreement, iteration by iteration; see `DynamicRouting`.

    Args:
        passing: the batched graph, from `bind`.
        u_hat: votes, `[B·E, D]`.
        iterations: R, at least 1.
        gradients: `"all"` lets gradients flow through every iteration, `"last"` stops them in all
            but the last.

    Yields:
        The R iterations; v of the last, `[B·J, D]`, is the result.

    Raises:
        ValueError: the number of votes is wrong, `iterations` is below 1, or `gradients` is
            unknown.

    >>> import torch, graphcaps as gc
    >>> passing = gc.bind(gc.complete_graph(children=6, parents=3))
    >>> *_, last = dynamic_routing(passing, torch.randn(18, 4), iterations=3)
    >>> last.v.shape
    torch.Size([3, 4])
    """
    return DynamicRouting(iterations, gradients=gradients).steps(EdgesWithVotes(passing, u_hat))


def uniform_routing(passing: MessagePassing, u_hat: Tensor) -> Iterator[Iteration]:
    """Route votes with equal coupling; see `UniformRouting`.

    Args:
        passing: the batched graph, from `bind`.
        u_hat: votes, `[B·E, D]`.

    Yields:
        One iteration, the result.

    Raises:
        ValueError: the number of votes is wrong.

    >>> import torch, graphcaps as gc
    >>> passing = gc.bind(gc.complete_graph(children=6, parents=3))
    >>> (only,) = uniform_routing(passing, torch.randn(18, 4))
    >>> only.c[0]
    tensor([0.3333])
    """
    return UniformRouting().steps(EdgesWithVotes(passing, u_hat))
