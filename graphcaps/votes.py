"""Poses of children and matrices enter, one vote per edge leaves: û_{j|i} = W_eᵀ u_i."""

import torch
from torch import Tensor


def votes_along_edges(u: Tensor, weight: Tensor, child: Tensor, weight_index: Tensor) -> Tensor:
    """Votes on the edges of any graph, the same one for every sample.

    Args:
        u: poses, `[B, I, K]`.
        weight: matrices, `[M, K, D]`.
        child: the child of each edge of one sample, int64 `[E]`.
        weight_index: the matrix of each edge, int64 `[E]`.

    Returns:
        Votes of the batch's edges, sample-major, `[B·E, D]`.

    >>> u, weight = torch.randn(2, 3, 8), torch.randn(1, 8, 16)
    >>> votes_along_edges(u, weight, torch.tensor([0, 2]), torch.tensor([0, 0])).shape
    torch.Size([4, 16])
    """
    u_hat = torch.einsum("bek,ekd->bed", u[:, child], weight[weight_index])
    return u_hat.reshape(-1, weight.shape[-1])


def votes_on_complete_graph(u: Tensor, weight: Tensor) -> Tensor:
    """The same on a complete graph whose edges each have a matrix: no pose is copied to an edge.

    Args:
        u: poses, `[B, I, K]`.
        weight: matrices, child-major, `[I·J, K, D]`.

    Returns:
        Votes of the batch's edges, `[B·I·J, D]`.

    >>> votes_on_complete_graph(torch.randn(2, 3, 8), torch.randn(3 * 5, 8, 16)).shape
    torch.Size([30, 16])
    """
    matrices = weight.unflatten(0, (u.shape[1], -1))
    u_hat = torch.einsum("bik,ijkd->bijd", u, matrices)
    return u_hat.reshape(-1, weight.shape[-1])
