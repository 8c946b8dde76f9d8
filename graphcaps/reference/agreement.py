"""Dense routings in which the agreement of a vote and a parent is their dot product."""

import math

import torch.nn.functional as F
from torch import Tensor

from graphcaps.reference.dense import (
    agreement,
    at_least_one,
    edges_of,
    expect,
    softmax_over_parents,
    squash,
    sum_over_children,
)


def dynamic_routing(
    u_hat: Tensor,
    iterations: int = 3,
    *,
    mask: Tensor | None = None,
    gradients: str = "all",
    bias: Tensor | None = None,
    leak: bool = False,
    accumulate: bool = True,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Routing by agreement, Sabour et al. 2017, procedure 1.

        b = 0
        R times:   c_ij = softmax of b_i over the parents of i
                   s_j = Σ_i c_ij û_ij,   v_j = squash(s_j)
                   b_ij += û_ij · v_j                           (not after the last)

    `bias` (added to s_j) and `leak` (a parent of logit 0 that competes and receives nothing) are
    in the authors' code, not in the paper. Without `accumulate`, b_ij = û_ij · v_j / temperature
    replaces the logits instead of being added to them: a soft k-means, as in Wang & Liu 2018.

    Args:
        u_hat: votes, `[B, I, J, D]`.
        iterations: R, at least 1.
        mask: which edges exist, bool `[I, J]`; all of them if not given.
        gradients: `"all"` lets gradients flow through every iteration; `"last"` stops them in
            all but the last.
        bias: added to the sums, `[J, D]`.
        leak: let a child couple to none of its parents.
        accumulate: add each agreement to the logits, or replace them by it.
        temperature: divisor of the agreement, above 0.

    Returns:
        The parents' outputs v, `[B, J, D]`, and the last coupling c, `[B, I, J]`, which sums to
        1 over the parents of each child that has any; to less with `leak`.

    Raises:
        ValueError: a tensor has another shape, `iterations` is below 1, `temperature` is not above
            0, or `gradients` is unknown.

    >>> import torch
    >>> v, c = dynamic_routing(torch.randn(2, 6, 3, 4), iterations=3)
    >>> v.shape, c.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 6, 3]))
    """
    edge = edges_of(u_hat, mask)
    at_least_one(iterations)
    if gradients not in ("all", "last"):
        raise ValueError(f"unknown gradients {gradients!r}; choose all or last")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    if bias is not None:
        expect("bias", bias, tuple(u_hat.shape[2:]), "[J, D]")
    b = u_hat.new_zeros(u_hat.shape[:3])
    for iteration in range(1, iterations + 1):
        last = iteration == iterations
        votes = u_hat if last or gradients == "all" else u_hat.detach()
        c = softmax_over_parents(b, edge, leak=leak)
        s = sum_over_children(c, votes)
        if bias is not None:
            s = s + (bias if last or gradients == "all" else bias.detach())
        v = squash(s)
        if not last:
            agreed = agreement(votes, v) / temperature
            b = b + agreed if accumulate else agreed
    return v, c


def uniform_routing(
    u_hat: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Couple each child equally to all its parents: the control that routing is compared with.

        c_ij = 1/(number of parents of i),   v_j = squash(Σ_i c_ij û_ij)

    This is the first iteration of dynamic routing.

    Args:
        u_hat: votes, `[B, I, J, D]`.
        mask: which edges exist, bool `[I, J]`; all of them if not given.
        bias: added to the sums, `[J, D]`.

    Returns:
        The parents' outputs v, `[B, J, D]`, and the coupling c, `[B, I, J]`.

    Raises:
        ValueError: a tensor has another shape.

    >>> import torch
    >>> v, c = uniform_routing(torch.randn(2, 6, 4, 3))
    >>> c[0, 0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return dynamic_routing(u_hat, 1, mask=mask, bias=bias)


def inverted_attention_routing(
    u_hat: Tensor,
    iterations: int = 2,
    *,
    mask: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Inverted dot-product attention routing, Tsai et al. 2020, procedure 1.

        v_j = LayerNorm(Σ_i û_ij / (number of parents of i))           the first iteration
        R − 1 times:   c_ij = softmax of û_i · v / √D over the parents of i
                       v_j = LayerNorm(Σ_i c_ij û_ij)

    The logits are replaced in each iteration, not added up. R includes the uniform first iteration,
    as `num_routing` in the authors' code does: R = 1 is equal coupling. The division by
    √D is in the authors' code (`CapsuleFC.scale`), not in procedure 1. LayerNorm runs over the D
    numbers of a capsule, with one weight and one bias `[D]` for all capsules of a layer.

    Args:
        u_hat: votes, `[B, I, J, D]`.
        iterations: R, at least 1.
        mask: which edges exist, bool `[I, J]`; all of them if not given.
        norm_weight: scale after the normalisation, `[D]`; 1 if not given.
        norm_bias: shift after it, `[D]`; 0 if not given.
        eps: added to the variance in LayerNorm.

    Returns:
        The parents' poses v, `[B, J, D]`, and the last coupling c, `[B, I, J]`, which sums to 1
        over the parents of each child that has any. A parent without children has v = norm_bias.

    Raises:
        ValueError: a tensor has another shape, or `iterations` is below 1.

    >>> import torch
    >>> v, c = inverted_attention_routing(torch.randn(2, 6, 3, 4), iterations=2)
    >>> v.shape, c.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 6, 3]))
    """
    edge = edges_of(u_hat, mask)
    at_least_one(iterations)
    dim = u_hat.shape[3]
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            expect(name, tensor, (dim,), "[D]")
    b = u_hat.new_zeros(u_hat.shape[:3])
    for iteration in range(1, iterations + 1):
        c = softmax_over_parents(b, edge)
        v = F.layer_norm(sum_over_children(c, u_hat), (dim,), norm_weight, norm_bias, eps)
        if iteration < iterations:
            b = agreement(u_hat, v) / math.sqrt(dim)
    return v, c
