"""Votes on the edges from poses of children and matrices: û_{j|i} = W_eᵀ u_i."""

import torch
import torch.nn.functional as F
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
    return u_hat.reshape(len(u) * structure.edges, rows * weight.shape[-1])


def with_coordinates(
    u: Tensor, weight: Tensor, coordinates: Tensor, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """Poses and matrices whose votes have coordinates of the children added to them.

    A coordinate is one more number of a pose, and one more row of each matrix, which holds a single
    1, says to which number of the vote it is added: of one row, the first n; of P rows, the last
    one of each of the first n.

    Args:
        u: poses, `[B, I, P·K]`.
        weight: matrices, `[M, K, D]`.
        coordinates: `[I, n]`; n is at most D where P is 1, else at most P.
        rows: P.

    Returns:
        Poses, `[B, I, P·K']`, and matrices, `[M, K', D]`; K' is K + n where P is 1, else K + 1.

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
