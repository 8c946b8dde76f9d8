"""A trained net and images enter; the numbers that figures draw leave."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from graphcaps import kernels, reference
from graphcaps.functional import length
from graphcaps.graph import is_complete
from graphcaps.layers import CapsuleLayer
from graphcaps.model import PRIMARY_STRIDE, CapsNet, CapsNetConfig
from graphcaps.passing import ENGINES

FLOAT32_ROUNDING = torch.finfo(torch.float32).eps  # 2⁻²³
TWEAKS = tuple(round(-0.25 + 0.05 * step, 2) for step in range(11))  # the paper's, figure 4


@dataclass(frozen=True)
class VoteMap:
    """How much each position of the capsule maps votes for a class, and where it looks.

    Attributes:
        amount: coupling × length of the children, summed over the maps, `[H, W]`.
        stride: distance of neighbouring positions in the image, in pixels.
        field: height and width of a position's receptive field, in pixels.
    """

    amount: Tensor
    stride: int
    field: int

    def centres(self) -> tuple[Tensor, Tensor]:
        """Row and column of every position's receptive field's centre, in pixels, `[H·W]`."""
        rows, columns = (
            self.stride * torch.arange(count) + (self.field - 1) / 2 for count in self.amount.shape
        )
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        return row.flatten(), column.flatten()


def votes_by_position(u: Tensor, c: Tensor, config: CapsNetConfig) -> Tensor:
    """How much each position of the capsule maps votes for each class: `Σ_maps c_ij |u_i|`.

    Args:
        u: poses of the primary capsules, `[..., I, K]`.
        c: their coupling, `[..., I·J]`, child by child, as a `Trace` has it.
        config: of the net, whose class capsules are completely connected.

    Returns:
        `[..., J, H, W]`.

    >>> config = CapsNetConfig(capsule_maps=2)
    >>> votes_by_position(torch.ones(7, 72, 8), torch.ones(3, 7, 720), config).shape
    torch.Size([3, 7, 10, 6, 6])
    """
    grid = config.grid_size()
    voted = c.unflatten(-1, (-1, config.classes)) * length(u).unsqueeze(-1)
    return voted.movedim(-1, -2).unflatten(-1, (config.capsule_maps, grid, grid)).sum(dim=-3)


def vote_map(u: Tensor, c: Tensor, parent: int, config: CapsNetConfig) -> VoteMap:
    """Where the votes of one image for one class come from.

    Args:
        u: poses of the image's primary capsules, `[I, K]`.
        c: their coupling at one iteration, `[I·J]`.
        parent: the class, j.
        config: of the net.

    Returns:
        The map.

    >>> config = CapsNetConfig(capsule_maps=2)
    >>> amounts = vote_map(torch.ones(72, 8), torch.full((720,), 0.1), 3, config).amount
    >>> amounts.shape, round(float(amounts[0, 0]), 3)
    (torch.Size([6, 6]), 0.566)
    """
    amount = votes_by_position(u, c, config)[parent]
    return VoteMap(amount, stride=PRIMARY_STRIDE, field=config.receptive_field())


@torch.no_grad()
def tweak_pose(
    model: CapsNet, poses: Tensor, parent: int, offsets: Sequence[float] = TWEAKS
) -> Tensor:
    """Draw a class capsule again and again, each dimension of its pose moved a little.

    Args:
        model: with a decoder.
        poses: class capsules of one image, `[J, D]`.
        parent: the class that is drawn.
        offsets: what is added, T numbers; the paper's if not given.

    Returns:
        A row per dimension and a column per offset, `[D, T, C, H, W]`.

    Raises:
        ValueError: a model without a decoder.

    >>> model = CapsNet.from_preset("small")
    >>> tweak_pose(model, torch.zeros(10, 16), parent=3).shape
    torch.Size([16, 11, 1, 28, 28])
    """
    if model.decoder is None:
        raise ValueError("this model has no decoder to draw with; train one with decoder_hidden")
    dim, count = poses.shape[1], len(offsets)
    moved = poses.expand(dim, count, -1, -1).clone()
    each = torch.arange(dim)
    moved[each, :, parent, each] += torch.tensor(offsets).to(poses)
    mask = poses.new_zeros(len(poses))
    mask[parent] = 1
    drawn = model.decoder(moved.flatten(0, 1), mask.expand(dim * count, -1))
    return drawn.unflatten(0, (dim, count))


def differences_from_dense(layer: CapsuleLayer, u: Tensor) -> dict[str, dict[str, float]]:
    """How far every engine, and dense routing itself, are in float32 from dense in float64.

    Args:
        layer: of dynamic routing on a complete graph, in float32; not changed.
        u: poses, `[B, I, K]`.

    Returns:
        For `"dense"` and each engine that can run where the layer is: the largest difference of
        the output v and of the gradients of |v|² with respect to u and to the weight, in units of
        float32 rounding, 2⁻²³ of the largest value.

    Raises:
        ValueError: a layer of another kind.

    >>> from graphcaps import complete_graph
    >>> layer = CapsuleLayer(complete_graph(6, 3), child_dim=4, parent_dim=5)
    >>> sorted(differences_from_dense(layer, torch.rand(2, 6, 4))["builtin"])
    ['gradient of u', 'gradient of weight', 'output v']
    """
    if layer.routing != "dynamic" or not is_complete(layer.graph) or u.dtype != torch.float32:
        raise ValueError(
            "expected a layer of dynamic routing on a complete graph and poses in float32; "
            f"got {layer.routing} routing, {layer.graph.num_edges()} edges and {u.dtype}"
        )

    def dense(u: Tensor, weight: Tensor) -> Tensor:
        votes = reference.votes(u, weight.unflatten(0, (u.shape[1], -1)))
        return reference.dynamic_routing(votes, layer.iterations, gradients=layer.gradients)[0]

    def by_engine(engine: str) -> Callable[[Tensor, Tensor], Tensor]:
        other = copy.deepcopy(layer)
        other.engine = engine
        return lambda u, weight: functional_call(other, {"weight": weight}, (u,))

    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"dense": dense}
    forms |= {e: by_engine(e) for e, kind in ENGINES.items() if kind.why_not(u.device) is None}
    if kernels.why_not(u.device, u.dtype) is None:
        forms["fused"] = by_engine("fused")
    truth = _with_gradients(dense, u.double(), layer.weight.double())
    return {
        form: {
            name: float((found - right).abs().max() / right.abs().max() / FLOAT32_ROUNDING)
            for (name, right), found in zip(
                truth.items(), _with_gradients(function, u, layer.weight).values(), strict=True
            )
        }
        for form, function in forms.items()
    }


def _with_gradients(
    function: Callable[[Tensor, Tensor], Tensor], u: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    u, weight = u.detach().requires_grad_(), weight.detach().requires_grad_()
    v = function(u, weight)
    of_u, of_weight = torch.autograd.grad(v.square().sum(), (u, weight))
    return {"output v": v.detach(), "gradient of u": of_u, "gradient of weight": of_weight}
