"""Votes enter, outputs without any routing leave: the control that routing is compared with."""

from collections.abc import Iterator

from torch import Tensor

from graphcaps.functional import squash
from graphcaps.passing import MessagePassing
from graphcaps.routing.iteration import Iteration


def uniform_routing(passing: MessagePassing, u_hat: Tensor) -> Iterator[Iteration]:
    """Couple each child equally to all its parents, c = 1/out-degree, the softmax of equal logits.

    Args:
        passing: the batched graph, bound to an engine.
        u_hat: votes, `[B·E, D]`.

    Yields:
        One iteration, the result.
    """
    b = u_hat.new_zeros(len(u_hat), 1)
    c = passing.softmax_over_parents(b)
    s, v = passing.sum_into_parents(c, u_hat, node_function=squash)
    yield Iteration(b, c, s, v)
