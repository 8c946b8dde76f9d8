"""What routings with Gaussian parents share: moments about a reference point."""

import torch
from torch import Tensor

from graphcaps.routing.edges import Edges

SMALLEST_MASS = 1e-7  # where N is below it and something is divided by N, it counts as this


@torch.no_grad()
def mean_of_equal_coupling(edges: Edges) -> Tensor:
    """A point near the first means, `[B·J, D]`, about which variances lose no digits."""
    sums = edges.couple(a=edges.a)
    return sums.S / sums.N.clamp_min(SMALLEST_MASS)


def squares_about(mu: Tensor, N: Tensor, S: Tensor, Q: Tensor, r: Tensor) -> Tensor:
    """`Σ w (û − μ)²` from sums about r, for any μ near r: `Q − 2 (μ − r) S + (μ − r)² N`."""
    d = mu - r
    return (Q - d * (2 * S - d * N)).clamp_min(0)  # rounding may leave less than nothing
