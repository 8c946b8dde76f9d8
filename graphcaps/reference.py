"""Votes `[B, I, J, D]` enter, outputs and coupling of dense routing leave: what all is measured by.

Written from the paper alone, in dense tensors: it imports nothing of this library, so that an
error in the graph form is not repeated here.
"""

import torch
from torch import Tensor


def squash(s: Tensor) -> Tensor:
    """`|s|²/(1+|s|²) · s/|s|` over the last dimension, and 0 where s is 0 (equation 1).

    Args:
        s: vectors, `[..., D]`.

    Returns:
        Squashed vectors, `[..., D]`.

    >>> squash(torch.tensor([0.0, 3.0]))
    tensor([0.0000, 0.9000])
    """
    square = s.square().sum(dim=-1, keepdim=True)
    # sqrt has no derivative at 0; the ones put there are multiplied by s = 0
    norm = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
    return square / (1 + square) * s / norm


def votes(u: Tensor, weight: Tensor) -> Tensor:
    """`û_{j|i} = W_ijᵀ u_i` for a complete graph.

    Args:
        u: poses of the children, `[B, I, K]`.
        weight: one matrix per child and parent, `[I, J, K, D]`.

    Returns:
        Votes, `[B, I, J, D]`.

    >>> votes(torch.rand(2, 6, 8), torch.rand(6, 3, 8, 16)).shape
    torch.Size([2, 6, 3, 16])
    """
    return torch.einsum("bik,ijkd->bijd", u, weight)


def dynamic_routing(
    u_hat: Tensor,
    iterations: int = 3,
    *,
    mask: Tensor | None = None,
    gradients: str = "all",
) -> tuple[Tensor, Tensor]:
    """Routing by agreement, Sabour et al. 2017, procedure 1, in any dtype.

    Args:
        u_hat: votes, `[B, I, J, D]`.
        iterations: R, at least 1.
        mask: which edges there are, bool `[I, J]`; all of them if not given.
        gradients: `"all"` lets gradients flow through every iteration; `"last"` stops them in
            all but the last.

    Returns:
        The parents' outputs v, `[B, J, D]`, and the last coupling c, `[B, I, J]`, which sums to
        1 over the parents of each child that has any.

    Raises:
        ValueError: iterations below 1.

    >>> v, c = dynamic_routing(torch.randn(2, 6, 3, 4), iterations=3)
    >>> v.shape, c.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 6, 3]))
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    batch, children, parents, _ = u_hat.shape
    edge = u_hat.new_ones(children, parents, dtype=torch.bool) if mask is None else mask
    b = u_hat.new_zeros(batch, children, parents)
    for iteration in range(1, iterations + 1):
        last = iteration == iterations
        votes_now = u_hat if last or gradients == "all" else u_hat.detach()
        # the least finite number, not −inf: a child without parents must not become NaN
        c = b.masked_fill(~edge, torch.finfo(b.dtype).min).softmax(dim=2) * edge
        v = squash(torch.einsum("bij,bijd->bjd", c, votes_now))
        if not last:
            b = b + torch.einsum("bijd,bjd->bij", votes_now, v)
    return v, c
