"""Votes on the edges from poses of children and matrices: û_{j|i} = W_eᵀ u_i."""

import torch
import torch.nn.functional as F
from torch import Tensor

from graphcaps.structure import Structure


def votes_on_edges(u: Tensor, weight: Tensor, structure: Structure, rows: int = 1) -> Tensor:
    """Compute the vote of every edge, for every sample.

    Args:
        u: poses, `[B, I, P·K]`: P rows of K numbers each.
        weight: matrices, `[M, K, D]`, in the dtype of `u`.
        structure: the graph, with the child and the matrix of each edge.
        rows: P; every row of a pose is multiplied by the same matrix. A vector has one row, a 4×4
            matrix has 4.

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


def with_coordinates(
    u: Tensor, weight: Tensor, coordinates: Tensor, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """Extend poses and matrices so that coordinates of the children are added to their votes.

    A coordinate becomes an additional number of a pose. Each matrix gets an additional row with a
    single 1, which selects the number of the vote to which the coordinate is added: with one row,
    the first n numbers; with P rows, the last number of each of the first n rows.

    Args:
        u: poses, `[B, I, P·K]`.
        weight: matrices, `[M, K, D]`.
        coordinates: `[I, n]`; n is at most D if P is 1, otherwise at most P.
        rows: P.

    Returns:
        Poses, `[B, I, P·K']`, and matrices, `[M, K', D]`; K' is K + n if P is 1, otherwise K + 1.

    >>> place = torch.tensor([[5, 7]])
    >>> u, weight = with_coordinates(torch.zeros(1, 1, 8), torch.ones(1, 8, 3), place)
    >>> u[0, 0] @ weight[0]
    tensor([5., 7., 0.])
    """
    count, dim = coordinates.shape[1], weight.shape[2]
    if rows == 1:
        added, to = coordinates.unsqueeze(1), torch.eye(count, dim)
    else:
        added, to = F.pad(coordinates, (0, rows - count)).unsqueeze(2), torch.eye(1, dim).flip(1)
    poses = u.unflatten(-1, (rows, -1))
    poses = torch.cat([poses, added.to(u).expand(len(u), -1, -1, -1)], dim=-1)
    matrices = torch.cat([weight, to.to(weight).expand(len(weight), -1, -1)], dim=1)
    return poses.flatten(2), matrices
