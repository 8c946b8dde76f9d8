"""Functions for routings with Gaussian parents: moments about a reference point."""

import torch
from torch import Tensor

from graphcaps.routing.edges import Edges

SMALLEST_MASS = 1e-7  # lower bound of N as a divisor


@torch.no_grad()
def mean_of_equal_coupling(edges: Edges) -> Tensor:
    """The means under equal coupling, `[B·J, D]`, as a reference point for precise variances."""
    sums = edges.couple(a=edges.a)
    return sums.S / sums.N.clamp_min(SMALLEST_MASS)


def squares_about(mu: Tensor, N: Tensor, S: Tensor, Q: Tensor, r: Tensor) -> Tensor:
    """`Σ w (û − μ)²` from sums about r, for any μ near r: `Q − 2 (μ − r) S + (μ − r)² N`."""
    d = mu - r
    return (Q - d * (2 * S - d * N)).clamp_min(0)  # rounding may give a negative number
