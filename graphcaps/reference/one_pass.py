"""Dense routings without iterations."""

import math

import torch
from torch import Tensor

from graphcaps.reference.dense import (
    SMALLEST_MASS,
    Routed,
    agreement,
    edges_of,
    expect,
    softmax_over_parents,
    sum_over_children,
)


def exponential_squash(s: Tensor) -> Tensor:
    """`(1 − e^−|s|) s/|s|` over the last dimension, and 0 where s is 0.

    Mazzia et al. 2021; steeper near 0 than `squash`, whose derivative vanishes there.

    Args:
        s: vectors, `[..., D]`.

    Returns:
        Squashed vectors, `[..., D]`.

    >>> exponential_squash(torch.tensor([0.0, 2.0]))
    tensor([0.0000, 0.8647])
    """
    square = s.square().sum(dim=-1, keepdim=True)
    # sqrt has no derivative at 0; the limit of (1 − e^−n)/n there is 1
    norm = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
    return torch.where(square > 0, -torch.expm1(-norm) / norm, torch.ones_like(norm)) * s


def self_attention_routing(
    u_hat: Tensor, beta: Tensor | None = None, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Self-attention routing of Efficient-CapsNet, Mazzia et al. 2021.

        b_ij = û_ij · Σ_i' û_i'j / √D        the votes for one parent attend to each other
        c_ij = softmax of b_i over the parents of i
        v_j = squash'(Σ_i (c_ij + β_ij) û_ij),   squash'(s) = (1 − e^−|s|) s/|s|

    Args:
        u_hat: votes, `[B, I, J, D]`.
        beta: learned priors, added after the softmax, `[I, J]`; none if not given.
        mask: which edges exist, bool `[I, J]`; all of them if not given.

    Returns:
        The parents' outputs v, `[B, J, D]`, and the coupling c without β, `[B, I, J]`, which
        sums to 1 over the parents of each child that has any.

    Raises:
        ValueError: a tensor has another shape.

    >>> v, c = self_attention_routing(torch.randn(2, 6, 3, 4), torch.zeros(6, 3))
    >>> v.shape, c.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 6, 3]))
    """
    edge = edges_of(u_hat, mask)
    everyone = edge.to(u_hat.dtype).expand(u_hat.shape[:3])
    total = sum_over_children(everyone, u_hat)
    c = softmax_over_parents(agreement(u_hat, total) / math.sqrt(u_hat.shape[3]), edge)
    weights = c
    if beta is not None:
        expect("beta", beta, tuple(u_hat.shape[1:3]), "[I, J]")
        weights = c + beta * edge
    return exponential_squash(sum_over_children(weights, u_hat)), c


def self_routing(u_hat: Tensor, a: Tensor, logits: Tensor, *, mask: Tensor | None = None) -> Routed:
    """Self-routing, Hahn, Pyeon & Kim 2019: the coupling depends only on the child's own pose.

        c_ij = softmax of logits_i over the parents of i
        w_ij = a_i c_ij,   N_j = Σ_i w_ij
        v_j = Σ_i w_ij û_ij / N_j
        a_j = N_j / Σ_i a_i                  over the children that vote for j

    The logits are a linear function of the child's pose, `W2_ijᵀ u_i + b2_ij`, not of its vote.
    As divisors, N_j and Σ_i a_i are at least 1e-7; the authors' code has no such bound. In their
    convolutions the parents in each window compete separately; here all parents of a child compete.

    Args:
        u_hat: votes, `[B, I, J, D]`.
        a: activations of the children, from 0 to 1, `[B, I]`.
        logits: `[B, I, J]`.
        mask: which edges exist, bool `[I, J]`; all of them if not given.

    Returns:
        The parents' poses v, `[B, J, D]`, the coupling c, `[B, I, J]`, which sums to 1 over the
        parents of each child that has any, and activations, `[B, J]`.

    Raises:
        ValueError: a tensor has another shape.

    >>> u_hat, a, logits = torch.randn(2, 6, 3, 4), torch.rand(2, 6), torch.zeros(2, 6, 3)
    >>> v, c, activation = self_routing(u_hat, a, logits)
    >>> v.shape, activation.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 3]))
    """
    edge = edges_of(u_hat, mask)
    expect("a", a, tuple(u_hat.shape[:2]), "[B, I]")
    expect("logits", logits, tuple(u_hat.shape[:3]), "[B, I, J]")
    c = softmax_over_parents(logits, edge)
    w = a.unsqueeze(-1) * c
    mass = w.sum(dim=1)
    at_most = (a.unsqueeze(-1) * edge).sum(dim=1)
    v = sum_over_children(w, u_hat) / mass.clamp_min(SMALLEST_MASS).unsqueeze(-1)
    return Routed(v, c, mass / at_most.clamp_min(SMALLEST_MASS))
