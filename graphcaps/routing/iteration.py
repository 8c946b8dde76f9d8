"""What every routing algorithm asks of the votes that enter, and the record that it yields."""

from typing import NamedTuple

from torch import Tensor

from graphcaps.passing import MessagePassing


class Iteration(NamedTuple):
    """What one iteration computes: edge features `[B·E, 1]`, parent features `[B·J, D]`."""

    b: Tensor  # logits it started from
    c: Tensor  # coupling, sums to 1 over the parents of a child
    s: Tensor  # weighted sum of the votes
    v: Tensor  # squashed


def check_votes(passing: MessagePassing, u_hat: Tensor) -> None:
    """Raise ValueError unless there is one vote for each edge."""
    if u_hat.dim() != 2 or len(u_hat) != passing.edges:
        raise ValueError(
            f"expected one vote for each of the {passing.edges} edges, [{passing.edges}, D]; "
            f"got {list(u_hat.shape)}"
        )
