"""Votes enter, outputs without any routing leave: the control that routing is compared with."""

from collections.abc import Iterator

from torch import Tensor

from graphcaps.functional import squash
from graphcaps.passing import MessagePassing
from graphcaps.routing.iteration import Iteration, check_votes


def uniform_routing(passing: MessagePassing, u_hat: Tensor) -> Iterator[Iteration]:
    """Couple each child equally to all its parents, c = 1/out-degree, the softmax of equal logits.

    Args:
        passing: the batched graph, bound to an engine.
        u_hat: votes, `[B·E, D]`.

    Yields:
        One iteration, the result.

    Raises:
        ValueError: not one vote per edge; when the iteration is asked for.

    >>> import torch, graphcaps as gc
    >>> passing = gc.bind(gc.complete_graph(children=6, parents=3))
    >>> (only,) = uniform_routing(passing, torch.randn(18, 4))
    >>> only.c[0]
    tensor([0.3333])
    """
    check_votes(passing, u_hat)
    b = u_hat.new_zeros(len(u_hat), 1)
    c = passing.softmax_over_parents(b)
    s, v = passing.sum_into_parents(c, u_hat, node_function=squash)
    yield Iteration(b, c, s, v)
