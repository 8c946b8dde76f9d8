"""The record of one iteration, which every routing algorithm yields."""

from typing import NamedTuple

from torch import Tensor


class Iteration(NamedTuple):
    """What one iteration computes: edge features `[B·E, 1]`, parent features `[B·J, D]`."""

    b: Tensor  # logits it started from
    c: Tensor  # coupling, sums to 1 over the parents of a child
    s: Tensor  # weighted sum of the votes
    v: Tensor  # squashed
