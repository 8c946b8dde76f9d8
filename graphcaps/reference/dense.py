"""Functions that the dense routings share: votes, squash, masked softmax, and shape checks."""

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_MASS = 1e-7  # lower bound of a sum of weights by which something is divided


class Routed(NamedTuple):
    """The result of a routing with activations."""

    v: Tensor  # poses of the parents, [B, J, D]
    c: Tensor  # coupling of the last iteration, [B, I, J]
    a: Tensor  # activations of the parents, [B, J]


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


def squash(s: Tensor) -> Tensor:
    """`|s|²/(1+|s|²) · s/|s|` over the last dimension, and 0 where s is 0.

    Sabour et al. 2017, equation 1.

    Args:
        s: vectors, `[..., D]`.

    Returns:
        Squashed vectors, `[..., D]`.

    >>> squash(torch.tensor([0.0, 3.0]))
    tensor([0.0000, 0.9000])
    """
    square = s.square().sum(dim=-1, keepdim=True)
    # sqrt has no derivative at 0; there its argument is replaced by 1, and the result times s is 0
    norm = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
    return square / (1 + square) * s / norm


def edges_of(u_hat: Tensor, mask: Tensor | None) -> Tensor:
    """Return which edges exist, bool `[I, J]`: the mask, or all of them.

    Raises:
        ValueError: votes or mask have another shape, or the mask is not bool.
    """
    if u_hat.dim() != 4:
        raise ValueError(f"expected votes [B, I, J, D]; got {list(u_hat.shape)}")
    if mask is None:
        return u_hat.new_ones(u_hat.shape[1:3], dtype=torch.bool)
    expect("mask", mask, u_hat.shape[1:3], "[I, J]")
    if mask.dtype != torch.bool:
        raise ValueError(f"expected mask to be bool; got {mask.dtype}, use mask != 0")
    return mask


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """Raise ValueError unless the tensor has this shape; `letters` names it in the message."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"expected {name} {letters} = {list(shape)}; got {list(tensor.shape)}")


def at_least_one(iterations: int) -> None:
    """Raise ValueError if the number of iterations is below 1."""
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")


def softmax_over_parents(b: Tensor, edge: Tensor, *, leak: bool = False) -> Tensor:
    """Softmax of the logits `[B, I, J]` over the parents of each child, 0 where there is no edge.

    With `leak`, one more parent with logit 0 competes; its coupling is dropped.
    """
    # the lowest finite number instead of −inf, so that a child without parents does not give NaN
    b = b.masked_fill(~edge, torch.finfo(b.dtype).min)
    if leak:
        b = torch.cat([torch.zeros_like(b[..., :1]), b], dim=-1)
    c = b.softmax(dim=-1)
    if leak:
        c = c[..., 1:]
    return c * edge


def sum_over_children(w: Tensor, x: Tensor) -> Tensor:
    """`Σ_i w_ij x_ij`, `[B, J, D]`, from weights `[B, I, J]` and edge features `[B, I, J, D]`."""
    return torch.einsum("bij,bijd->bjd", w, x)


def agreement(u_hat: Tensor, v: Tensor) -> Tensor:
    """`û_ij · v_j`, `[B, I, J]`, from votes `[B, I, J, D]` and parents `[B, J, D]`."""
    return torch.einsum("bijd,bjd->bij", u_hat, v)
