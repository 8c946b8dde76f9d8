"""Votes on the edges from poses of children and matrices: û_{j|i} = W_eᵀ u_i."""

import torch
from torch import Tensor

from graphcaps.structure import Structure


def votes_on_edges(u: Tensor, weight: Tensor, structure: Structure, rows: int = 1) -> Tensor:
    """The vote of every edge, for every sample.

    Args:
        u: poses, `[B, I, P·K]`: P rows of K numbers each.
        weight: matrices, `[M, K, D]`, in the dtype of `u`.
        structure: which child votes with which matrix on which edge.
        rows: P; every row of a pose is multiplied by the same matrix. A pose that is a vector is
            one row, a 4×4 pose matrix is 4.

    Returns:
        Votes of the batch's edges, sample-major, `[B·E, P·D]`.

    >>> from graphcaps import routing_graph
    >>> structure = Structure(routing_graph([0, 2], [0, 0], weight_index=[0, 0]))
    >>> votes_on_edges(torch.randn(2, 3, 8), torch.randn(1, 8, 16), structure).shape
    torch.Size([4, 16])
    """
    u = u.unflatten(-1, (rows, -1))
    if structure.complete:  # no pose is copied to an edge
        matrices = weight[: structure.edges].unflatten(0, (structure.children, structure.parents))
        u_hat = torch.einsum("bipk,ijkd->bijpd", u, matrices)
    else:
        on_edges = structure.groups("child", u.device).expand(u, dim=1)
        matrices = structure.groups("kind", u.device).expand(weight, dim=0)
        u_hat = torch.einsum("bepk,ekd->bepd", on_edges, matrices)
    return u_hat.reshape(u.shape[0] * structure.edges, rows * weight.shape[-1])
