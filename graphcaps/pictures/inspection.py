"""Computes numbers about layers and trained nets, for figures and reports."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphcaps import engines
from graphcaps.functional import length
from graphcaps.layers import CapsuleLayer
from graphcaps.nets.model import CapsNet, CapsNetConfig
from graphcaps.votes import with_coordinates

FLOAT32_ROUNDING = torch.finfo(torch.float32).eps  # 2⁻²³
TWEAKS = tuple(round(-0.25 + 0.05 * step, 2) for step in range(11))  # offsets of figure 4


@dataclass(frozen=True)
class VoteMap:
    """How strongly each position of the capsule maps votes for a class.

    Attributes:
        amount: sum over the children at each position, `[H, W]`, of the quantity that `vote_map` or
            `contribution_map` computes.
        stride: distance between neighbouring positions in the image, in pixels.
        field: height and width of a position's receptive field, in pixels.
        start: first row and column of the first receptive field; negative with padding.
    """

    amount: Tensor
    stride: int
    field: int
    start: int = 0

    def centres(self) -> tuple[Tensor, Tensor]:
        """Row and column of the centres of all receptive fields, in pixels, `[H·W]`."""
        rows, columns = (
            self.start + self.stride * torch.arange(count) + (self.field - 1) / 2
            for count in self.amount.shape
        )
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        return row.flatten(), column.flatten()


def votes_by_position(
    u: Tensor, c: Tensor, config: CapsNetConfig, a: Tensor | None = None
) -> Tensor:
    """How strongly each position of the capsule maps votes for each class: `Σ_maps c_ij |u_i|`.

    Args:
        u: poses of the primary capsules, `[..., I, K]`.
        c: their coupling, `[..., I·J]`, in the edge order of a `Trace`.
        config: configuration of the net, whose class capsules must be fully connected.
        a: activations of the primary capsules, `[..., I]`, used instead of the lengths |u|.

    Returns:
        `[..., J, H, W]`.

    >>> config = CapsNetConfig(capsule_maps=2)
    >>> votes_by_position(torch.ones(7, 72, 8), torch.ones(3, 7, 720), config).shape
    torch.Size([3, 7, 10, 6, 6])
    """
    strength = length(u) if a is None else a
    voted = c.unflatten(-1, (-1, config.classes)) * strength.unsqueeze(-1)
    return voted.movedim(-1, -2).unflatten(-1, (config.child_maps, *config.grid_size())).sum(dim=-3)


def vote_map(u: Tensor, c: Tensor, parent: int, config: CapsNetConfig) -> VoteMap:
    """Map the positions from which the votes of one image for one class come.

    Args:
        u: poses of the image's primary capsules, `[I, K]`.
        c: their coupling at one iteration, `[I·J]`.
        parent: the class, j.
        config: configuration of the net.

    Returns:
        The map.

    >>> config = CapsNetConfig(capsule_maps=2)
    >>> amounts = vote_map(torch.ones(72, 8), torch.full((720,), 0.1), 3, config).amount
    >>> amounts.shape, round(float(amounts[0, 0]), 3)
    (torch.Size([6, 6]), 0.566)
    """
    return map_of(votes_by_position(u, c, config)[parent], config)


def map_of(amount: Tensor, config: CapsNetConfig) -> VoteMap:
    """A map of amounts by position, `[H, W]`, with the receptive fields of a net's positions."""
    return VoteMap(
        amount, config.field_stride(), config.receptive_field(), start=config.field_start()
    )


def contribution_map(contributions: Tensor, parent: int, config: CapsNetConfig) -> VoteMap:
    """Map the contribution of each position to the length |s_j| of a class's weighted sum.

    Args:
        contributions: those of one image at one iteration, `[I·J]`, from `Trace.contributions`.
        parent: the class, j.
        config: configuration of the net, whose class capsules must be fully connected.

    Returns:
        The map; its amounts add up to |s_j|, and are negative where votes point away from s_j.

    >>> config = CapsNetConfig(capsule_maps=2)
    >>> contribution_map(torch.full((720,), 0.01), 3, config).amount.shape
    torch.Size([6, 6])
    """
    of_parent = contributions.unflatten(0, (-1, config.classes))[:, parent]
    amount = of_parent.unflatten(0, (config.child_maps, *config.grid_size())).sum(dim=0)
    return map_of(amount, config)


@torch.no_grad()
def tweak_pose(
    model: CapsNet, poses: Tensor, parent: int, offsets: Sequence[float] = TWEAKS
) -> Tensor:
    """Reconstruct an image while varying each dimension of its pose.

    Args:
        model: a net with a decoder.
        poses: class capsules of one image, `[J, D]`.
        parent: the class to reconstruct.
        offsets: T numbers to add; by default those of Sabour et al. 2017, figure 4.

    Returns:
        A row per dimension and a column per offset, `[D, T, C, H, W]`.

    Raises:
        ValueError: the model has no decoder.

    >>> model = CapsNet.from_preset("small")
    >>> tweak_pose(model, torch.zeros(10, 16), parent=3).shape
    torch.Size([16, 11, 1, 28, 28])
    """
    if model.decoder is None:
        raise ValueError("expected a model with a decoder; this one has decoder_hidden=None")
    dim, count = poses.shape[1], len(offsets)
    moved = poses.expand(dim, count, -1, -1).clone()
    each = torch.arange(dim)
    moved[each, :, parent, each] += torch.tensor(offsets).to(poses)
    mask = poses.new_zeros(len(poses))
    mask[parent] = 1
    drawn = model.decoder(moved.flatten(0, 1), mask.expand(dim * count, -1))
    return drawn.unflatten(0, (dim, count))


def dense_form(layer: CapsuleLayer) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that computes a layer with the dense form of its routing.

    The dense forms are those of `graphcaps.reference`.

    Args:
        layer: a layer whose routing has a dense form, on a graph with at most one edge between two
            nodes. The function uses its parameters, which receive the gradients.

    Returns:
        A function of poses u, `[B, I, K]`, and of activations a, `[B, I]`, if the routing has them.
        It returns poses, `[B, J, D]`, the last coupling, `[B, I, J]`, and activations, `[B, J]`, if
        the routing has them.

    Raises:
        ValueError: the edges that compete are not those of each child.

    >>> from graphcaps import complete_graph
    >>> layer = CapsuleLayer(complete_graph(6, 3), child_dim=4, parent_dim=5)
    >>> v, c = dense_form(layer)(torch.rand(2, 6, 4))
    >>> v.shape, c.shape
    (torch.Size([2, 3, 5]), torch.Size([2, 6, 3]))
    """
    structure = layer.structure
    if not structure.by_child:
        raise ValueError(
            "in the dense form all edges of a child compete; this graph defines another "
            "competition, see routing_graph"
        )
    size = (structure.children, structure.parents)

    def by_edge(of_kinds: Tensor) -> Tensor:
        if structure.complete:
            return of_kinds.unflatten(0, size)
        kind, child, parent = (
            structure.numbers(name, of_kinds.device) for name in ("weight_index", "child", "parent")
        )
        dense = of_kinds.new_zeros(*size, *of_kinds.shape[1:])
        return dense.index_put((child, parent), of_kinds[kind])

    def dense(u: Tensor, a: Tensor | None = None) -> tuple[Tensor, ...]:
        weight: Tensor = layer.weight
        if layer.coordinates is not None:
            u, weight = with_coordinates(u, weight, layer.coordinates, layer.rows)
        rows = u.unflatten(2, (layer.rows, -1))
        u_hat = torch.einsum("bipk,ijkd->bijpd", rows, by_edge(weight)).flatten(3)
        mask = by_edge(torch.ones(structure.kinds, dtype=torch.bool, device=u.device))
        return layer.routing.dense(u_hat, a, mask, by_edge)

    return dense


def differences_from_dense(
    layer: CapsuleLayer, u: Tensor, a: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Compare every engine and the dense form, in float32, with the dense form in float64.

    Args:
        layer: a layer in float32, as for `dense_form`; it is not modified.
        u: poses, `[B, I, K]`.
        a: activations, `[B, I]`, if the routing has them.

    Returns:
        For `"dense"` and each engine that can run on the layer's device: the largest difference of
        the poses, the activations, and of the gradients of a random linear function of both, in
        units of float32 rounding, 2⁻²³ of the largest value.

    Raises:
        ValueError: the layer or the poses have another dtype.
        NotImplementedError: the routing has no dense form.

    >>> from graphcaps import complete_graph
    >>> layer = CapsuleLayer(complete_graph(6, 3), child_dim=4, parent_dim=5)
    >>> sorted(differences_from_dense(layer, torch.rand(2, 6, 4))["builtin"])
    ['gradient of u', 'gradient of weight', 'poses']
    """
    if u.dtype != torch.float32 or layer.weight.dtype != torch.float32:
        raise ValueError(
            f"expected a layer and poses in float32; got {layer.weight.dtype} and {u.dtype}"
        )
    able = [
        engine
        for engine in engines.ENGINES
        if engines.why_not(engine, u.device, u.dtype, routing=layer.routing) is None
    ]
    layer = copy.deepcopy(layer).requires_grad_()
    truth = results_and_gradients("dense", copy.deepcopy(layer).double(), u, a)
    differences = {}
    for form in ("dense", *able):
        found = results_and_gradients(form, layer, u, a)
        differences[form] = {
            name: float((found[name] - right).abs().max() / right.abs().max() / FLOAT32_ROUNDING)
            for name, right in truth.items()
            if right.any()
        }
    return differences


def results_and_gradients(
    form: str, layer: CapsuleLayer, u: Tensor, a: Tensor | None = None
) -> dict[str, Tensor]:
    """Poses and activations of a layer, and all gradients of a random linear function of them.

    They are returned by name. The random function is the same in each call.

    Args:
        form: `"dense"` or the name of an engine.
        layer: as for `dense_form`.
        u: poses, converted to the layer's dtype.
        a: activations, likewise.
    """
    u = u.detach().to(layer.weight).requires_grad_()
    inputs = {"u": u, **dict(layer.named_parameters())}
    poses_and_activations: tuple[Tensor, ...] = (u,)
    if a is not None:
        inputs["a"] = a.detach().to(layer.weight).requires_grad_()
        poses_and_activations = (u, inputs["a"])
    if form == "dense":
        poses, _, *activations = dense_form(layer)(*poses_and_activations)
        found = (poses, *activations)
    else:
        layer.engine = form
        given = layer(*poses_and_activations)
        found = given if isinstance(given, tuple) else (given,)
    # not a sum of squares, which is constant for normalised poses: its gradient would be noise
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(x.shape, generator=generator).to(x) for x in found]
    loss = torch.stack([(x * r).sum() for x, r in zip(found, drawn, strict=True)]).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    results = {n: x.detach() for n, x in zip(("poses", "activations"), found, strict=False)}
    return results | {f"gradient of {n}": g for n, g in zip(inputs, gradients, strict=True)}
