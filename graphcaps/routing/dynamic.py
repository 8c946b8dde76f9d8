"""Votes enter, outputs of routing by agreement leave: Sabour et al. 2017, procedure 1."""

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from graphcaps.functional import squash
from graphcaps.passing import MessagePassing
from graphcaps.routing.iteration import Iteration, check_votes


def dynamic_routing(
    passing: MessagePassing,
    u_hat: Tensor,
    iterations: int = 3,
    gradients: Literal["all", "last"] = "all",
) -> Iterator[Iteration]:
    """Route by agreement: a child couples more to the parents that its votes agree with.

    Args:
        passing: the batched graph, bound to an engine.
        u_hat: votes, `[B·E, D]`.
        iterations: R, at least 1.
        gradients: `"all"` lets gradients flow through every iteration, as the authors do;
            `"last"` stops them in all but the last.

    Yields:
        The R iterations; v of the last is the result.

    Raises:
        ValueError: not one vote per edge, iterations below 1, another word for `gradients`; when
            the first iteration is asked for.

    >>> import torch, graphcaps as gc
    >>> passing = gc.bind(gc.complete_graph(children=6, parents=3))
    >>> *_, last = dynamic_routing(passing, torch.randn(18, 4), iterations=3)
    >>> last.v.shape
    torch.Size([3, 4])
    """
    check_votes(passing, u_hat)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    if gradients not in ("all", "last"):
        raise ValueError(f"unknown gradients {gradients!r}; choose all or last")
    b = u_hat.new_zeros(len(u_hat), 1)
    for iteration in range(1, iterations + 1):
        last = iteration == iterations
        votes = u_hat if last or gradients == "all" else u_hat.detach()
        c = passing.softmax_over_parents(b)
        s, v = passing.sum_into_parents(c, votes, node_function=squash)
        yield Iteration(b, c, s, v)
        if not last:
            b = b + passing.agreement(votes, v)
