"""Layers of capsules: primary capsules from feature maps, and capsules routed over a graph."""

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphcaps import engines, kernels
from graphcaps._dgl import dgl
from graphcaps.conversion import EdgeTypes
from graphcaps.functional import squash
from graphcaps.passing import passing_on
from graphcaps.routing import (
    Edges,
    EdgesWithoutVotes,
    EdgesWithVotes,
    Routing,
    Sizes,
    Trace,
    make_routing,
)
from graphcaps.routing.base import check_at_least_1
from graphcaps.structure import Structure, structure_of
from graphcaps.tracing import is_traced
from graphcaps.votes import votes_on_edges, with_coordinates


class NonFinitePosesError(ValueError):
    """Poses with NaN or infinity reached a capsule layer."""


class Capsules(NamedTuple):
    """Capsules with activations, the output of a layer whose routing has activations.

    Attributes:
        poses: `[B, J, D]`.
        activations: from 0 to 1, `[B, J]`.

    >>> import graphcaps as gc
    >>> layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 16, 16, rows=4, routing="em")
    >>> layer(torch.rand(2, 6, 16), torch.rand(2, 6)).activations.shape
    torch.Size([2, 3])
    """

    poses: Tensor
    activations: Tensor


class PrimaryCapsules(nn.Module):
    """The first capsules: a convolution whose channels are grouped into poses, then squashed.

    The channels are `capsule_maps` groups of `capsule_dim`. A capsule is the channels of one
    group at one position; there is no ReLU before squash (Sabour et al. 2017, section 4).
    Capsules are ordered by map, then row, then column.

    With `activations`, a group has one channel more, whose logistic function is the activation of
    its capsules, and poses are not squashed (Hinton et al. 2018, section 4). With `depthwise`, each
    channel is computed from one channel alone (Mazzia et al. 2021, section 3.1).

    Args:
        in_channels: channels of the input.
        capsule_maps: number of groups of channels.
        capsule_dim: length of a pose, K.
        kernel_size: kernel size of the convolution, in pixels.
        stride: stride of the convolution, in pixels.
        padding: padding of the convolution, in pixels.
        activations: also return activations.
        depthwise: do not mix the channels of the input; the number of output channels of the
            convolution must be a multiple of `in_channels`.
        squash: squash function for poses, used without `activations`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    >>> PrimaryCapsules(256, capsule_maps=32, capsule_dim=8)(torch.rand(2, 256, 20, 20)).shape
    torch.Size([2, 1152, 8])
    """

    def __init__(
        self,
        in_channels: int,
        capsule_maps: int,
        capsule_dim: int,
        kernel_size: int = 9,
        stride: int = 2,
        *,
        padding: int = 0,
        activations: bool = False,
        depthwise: bool = False,
        squash: Callable[[Tensor], Tensor] = squash,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, number in (
            ("in_channels", in_channels),
            ("capsule_maps", capsule_maps),
            ("capsule_dim", capsule_dim),
        ):
            check_at_least_1(name, number)
        self.capsule_maps = capsule_maps
        self.capsule_dim = capsule_dim
        self.activations = activations
        self.squash = squash
        self.least = max(1, kernel_size - 2 * padding)  # rows and columns of features
        self.conv = nn.Conv2d(
            in_channels,
            capsule_maps * (capsule_dim + activations),
            kernel_size,
            stride,
            padding,
            groups=in_channels if depthwise else 1,
            device=device,
            dtype=dtype,
        )

    def forward(self, features: Tensor) -> Tensor | Capsules:
        """Group the channels at every position into poses.

        Args:
            features: `[B, in_channels, H, W]`.

        Returns:
            Poses, `[B, I, K]`; with `activations`, `Capsules` of poses and activations, `[B, I]`.

        Raises:
            ValueError: the features have another shape, or are smaller than the kernel.
        """
        channels, least = self.conv.in_channels, self.least
        if features.dim() != 4 or features.shape[1] != channels or min(features.shape[2:]) < least:
            raise ValueError(
                f"expected features of shape [batch, {channels}, at least {least}, "
                f"at least {least}]; got {list(features.shape)}"
            )
        # under autocast the convolution may be in bfloat16; capsules stay in the weights' dtype
        maps = self.conv(features).to(self.conv.weight.dtype)
        groups = maps.unflatten(1, (self.capsule_maps, -1))  # [B, maps, K or K + 1, H, W]
        capsules = groups.permute(0, 1, 3, 4, 2).flatten(1, 3)
        if not self.activations:
            return self.squash(capsules)
        return Capsules(capsules[..., :-1].contiguous(), capsules[..., -1].sigmoid())

    def extra_repr(self) -> str:
        """Options that the convolution does not show, for `print(layer)`."""
        end = "with activations" if self.activations else self.squash.__name__
        return f"{self.capsule_maps} maps of {self.capsule_dim}, {end}"


class CapsuleLayer(nn.Module):
    """Capsules over any bipartite graph: votes on its edges, routed to its parents.

    The layer keeps no state between calls, and samples do not affect each other. Votes and routing
    are computed in the dtype of `weight`, also under autocast. If that is a 16-bit dtype, they are
    computed in float32 and rounded once.

    Args:
        graph: from `complete_graph` or `routing_graph`, or any DGL graph, see `etype`. It is copied
            and not modified; later changes to it have no effect. None for a layer that takes a
            graph in each call.
        child_dim: numbers in the pose of a child.
        parent_dim: numbers in the pose of a parent.
        routing: a name in `ROUTINGS` (`"dynamic"`, `"uniform"`, `"em"`, `"attention"`,
            `"self_attention"`, `"self_routing"`, `"variational_bayes"`), or a `Routing`.
        rows: P, rows of a pose. Each row is multiplied by the same matrix: with 16 numbers and 4
            rows, poses are 4×4 matrices as in Hinton et al. 2018. One row is a vector.
        engine: `"udf"`, `"builtin"` or `"scatter"` use message passing; `"fused"` is a kernel that
            never stores a vote, and has no traces; `"auto"` uses the kernel where it is supported
            and faster. `"fused"` and `"scatter"` support torch.compile, torch.export and
            `torch.func`; second derivatives need `"scatter"`. The engine has no parameters and can
            be changed at any time.
        coordinates: the position of each child, `[I, n]`, which is added to its votes: to the first
            n numbers of a vote with one row, or to the last number of the first n rows of a vote
            with several. This is for matrices that are shared by children at different positions.
        etype: the edge type from children to parents, by its name or as DGL's `(child type, name,
            parent type)`, or a list of several that lead to the same node type. By default the
            graph's only edge type. Edges of one type share a matrix, in the order of the list,
            unless they have the feature `weight_index`. Parents share the parameters that a
            routing learns for parents, unless they have the feature `type`.
        kinds: number of matrices, M; by default as many as the graph refers to.
        types: number of types of parents, T; by default as many as the graph has.
        device: device of the parameters.
        dtype: dtype of the parameters.
        options: options of the named routing, such as `iterations`.

    Attributes:
        weight: `[M, K, D]`, one matrix for each number in the graph's `weight_index`; K and D are
            the numbers in a row of a child's and of a parent's pose.
        routing: the `Routing`, with its parameters.
        graph: the layer's copy of the graph.
        coordinates: as given, or None; saved with the parameters.

    Raises:
        ValueError: `graph` is not a DGL graph or lacks the edge types; neither a graph nor `kinds`
            is given; a size is below 1 or not divisible by `rows`; a name is unknown; the routing
            does not have an option; or the coordinates do not match.

    >>> from graphcaps import complete_graph
    >>> layer = CapsuleLayer(complete_graph(1152, 10), child_dim=8, parent_dim=16)
    >>> layer(torch.rand(2, 1152, 8)).shape
    torch.Size([2, 10, 16])

    One matrix from every atom to its molecule, with a graph in each call:

    >>> pooled = dgl.heterograph({("atom", "in", "molecule"): ([0, 1, 2], [0, 0, 1])})
    >>> CapsuleLayer(kinds=1, child_dim=8, parent_dim=16)(torch.rand(3, 8), graph=pooled).shape
    torch.Size([2, 16])
    """

    coordinates: Tensor | None

    def __init__(
        self,
        graph: dgl.DGLGraph | None = None,
        child_dim: int = 0,  # always needed; Python wants a default after that of graph
        parent_dim: int = 0,
        *,
        routing: str | Routing = "dynamic",
        rows: int = 1,
        engine: str = "auto",
        coordinates: Tensor | None = None,
        etype: EdgeTypes | None = None,
        kinds: int | None = None,
        types: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, number in (("kinds", kinds), ("types", types)):
            if number is not None:
                check_at_least_1(name, number)
        self.etype = etype
        self._structure = None
        if graph is not None:
            self._structure = Structure(graph, kinds=kinds, etype=etype)
            kinds, types = self._structure.kinds, types or self._structure.types
        elif kinds is None:
            raise ValueError(
                "a layer without a graph of its own needs its number of matrices: give a graph, "
                "or kinds"
            )
        for name, number in (("child_dim", child_dim), ("parent_dim", parent_dim), ("rows", rows)):
            check_at_least_1(name, number)
        if child_dim % rows or parent_dim % rows:
            raise ValueError(
                f"poses of {rows} rows need child_dim and parent_dim to be multiples of {rows}; "
                f"got {child_dim} and {parent_dim}"
            )
        engines.check_engine(engine)
        self.rows = rows
        self.engine = engine
        self.routing = make_routing(routing, **options)
        self.weight = nn.Parameter(
            torch.empty(
                kinds,
                child_dim // rows,
                parent_dim // rows + self.routing.vote_columns,
                device=device,
                dtype=dtype,
            )
        )
        self.register_buffer("coordinates", None)
        if coordinates is not None:
            self.coordinates = self._checked_coordinates(coordinates).to(self.weight)
        sizes = Sizes(kinds, 1 if types is None else types, rows, parent_dim)
        self.routing.build_once(sizes, self.weight.device, self.weight.dtype)
        self.reset_parameters()
        self._prepare()

    @property
    def structure(self) -> Structure:
        """The structure of the layer's graph; raises ValueError if the layer has no graph."""
        if self._structure is None:
            raise ValueError("this layer has no graph of its own; give each call one: graph=")
        return self._structure

    @property
    def graph(self) -> dgl.DGLGraph:
        """The layer's copy of its graph."""
        return self.structure.graph

    def reset_parameters(self) -> None:
        """Initialise `weight` and the parameters of the routing."""
        self.routing.reset_parameters(self.weight)

    def _prepare(self) -> None:
        """Prepare the graph for calls now, because it cannot be prepared while torch traces."""
        device = self.weight.device
        if self._structure is None:
            return
        self._structure.prepare(device)
        if kernels.why_not(device) is None:
            EdgesWithoutVotes.prepare(self._structure, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CapsuleLayer":
        """Move to another device or dtype; called by `to`, `cuda` and similar methods."""
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, or of what was pickled
        self._prepare()

    def forward(
        self,
        u: Tensor | Mapping[str, Tensor],
        a: Tensor | Mapping[str, Tensor] | None = None,
        *,
        graph: dgl.DGLGraph | None = None,
        return_trace: bool = False,
    ) -> Tensor | Capsules | tuple[Tensor | Capsules, Trace]:
        """Route poses to the parents.

        Args:
            u: poses of the children, `[B, I, child_dim]`, or of one sample, `[I, child_dim]`; a
                dict with one tensor for each node type if the children have several.
            a: activations of the children, `[B, I]` or `[I]`, or such a dict, for a routing that
                has activations; 1 if not given.
            graph: another graph for this call, whose `weight_index` refers to `weight`. This is for
                ragged batches, which `dgl.batch` creates from graphs of any sizes. It is checked
                and prepared again only if it changed, or is not among the last few graphs of such
                calls. Under `torch.compile` it causes a graph break.
            return_trace: also return a trace of the iterations.

        Returns:
            Poses of the parents, `[B, J, parent_dim]`, or of one sample, `[J, parent_dim]`. For a
            routing with activations, `Capsules` of these poses and activations `[B, J]` or `[J]`.
            With `return_trace`, this and a `Trace`.

        Raises:
            ValueError: poses or activations do not match graph and weight in shape, dtype or
                device; poses with NaN or infinity reach a parent (checked on the CPU only, because
                it would synchronise a GPU); activations are given to a routing without them; a
                trace is requested of engine `"fused"`; or there is no graph.
            RuntimeError: the engine cannot run on the device of `u`.
        """
        structure = (
            self.structure if graph is None else structure_of(graph, len(self.weight), self.etype)
        )
        u = structure.join("u", u, dim=-2)
        a = a if a is None else structure.join("a", a, dim=-1)
        alone = u.dim() == 2
        if _under_autocast(u.device.type) and u.is_floating_point():
            u = u.to(self.weight.dtype)
            a = a if a is None else a.to(self.weight.dtype)
        self._check(u, a, structure)
        if alone:  # a ragged batch is one sample
            u, a = u.unsqueeze(0), a if a is None else a.unsqueeze(0)
        with _without_autocast(u.device.type):
            poses, activations, trace = self._route(u, a, structure, return_trace)
        _check_finite(poses, u)
        if alone:
            poses = poses.squeeze(0)
            activations = activations if activations is None else activations.squeeze(0)
        capsules = poses if activations is None else Capsules(poses, activations)
        return capsules if trace is None else (capsules, trace)

    def _route(
        self, u: Tensor, a: Tensor | None, structure: Structure, return_trace: bool
    ) -> tuple[Tensor, Tensor | None, Trace | None]:
        dtype = u.dtype
        # 16-bit dtypes cannot count beyond 256 or 2048: longer sums would stop growing
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        samples = u.shape[0]
        u, weight = u.to(wide), self.weight.to(wide)
        if self.coordinates is not None:
            u, weight = with_coordinates(u, weight, self.coordinates.to(wide), self.rows)
        if self.routing.activations and a is None:
            a = u.new_ones(samples, structure.children)
        if a is not None:
            a = a.to(wide).reshape(samples * structure.children, 1)
        engine = engines.choose(
            self.engine,
            u.device,
            wide,
            routing=self.routing,
            structure=structure,
            trace=return_trace,
        )
        edges: Edges
        if engine == "fused":
            edges = EdgesWithoutVotes(structure, u, weight, self.rows, a)
            v = self.routing.by_kernel(edges)
            if v is not None:
                return v.unflatten(0, (samples, structure.parents)).to(dtype), None, None
        else:
            u_hat = votes_on_edges(u, weight, structure, self.rows)
            edges = EdgesWithVotes(passing_on(structure, engine, samples, u.device), u_hat, a)
        iterations = deque(self.routing.steps(edges), maxlen=None if return_trace else 1)
        last = iterations[-1]
        poses = last.v.unflatten(0, (samples, structure.parents)).to(dtype)
        activations = None
        if self.routing.activations and last.a is not None:
            activations = last.a.view(samples, structure.parents).to(dtype)
        trace = Trace.of(structure.graph, samples, u_hat, iterations) if return_trace else None
        return poses, activations, trace

    def _check(self, u: Tensor, a: Tensor | None, structure: Structure) -> None:
        if len(self.weight) < structure.kinds:
            raise ValueError(
                f"the graph's weight_index refers to {structure.kinds} matrices, but weight has "
                f"{len(self.weight)}"
            )
        child_dim = self.rows * self.weight.shape[1]
        children = structure.children
        if u.dim() not in (2, 3) or u.shape[-2:] != (children, child_dim):
            raise ValueError(
                f"the graph has {children} children with poses of length {child_dim}: expected u "
                f"of shape [batch, {children}, {child_dim}] or [{children}, {child_dim}], "
                f"got {list(u.shape)}"
            )
        if self.coordinates is not None and len(self.coordinates) != children:
            raise ValueError(
                f"the graph has {children} children, but there are coordinates for "
                f"{len(self.coordinates)}"
            )
        if a is not None and not self.routing.activations:
            raise ValueError(
                f"{self.routing.name} routing has no activations: call layer(u), or choose one "
                "that has, such as 'em'"
            )
        if a is not None and a.shape != u.shape[:-1]:
            raise ValueError(
                f"expected one activation for each child, {list(u.shape[:-1])}; got {list(a.shape)}"
            )
        for name, x in (("u", u), ("a", a)):
            if x is not None and (x.dtype != self.weight.dtype or x.device != self.weight.device):
                raise ValueError(
                    f"{name} and weight must have one dtype and one device; got {name} in "
                    f"{x.dtype} on {x.device} and weight in {self.weight.dtype} on "
                    f"{self.weight.device}; use {name}.to(layer.weight)"
                )

    def _checked_coordinates(self, coordinates: Tensor) -> Tensor:
        children, dim = self.structure.children, self.weight.shape[2]
        most = self.rows if self.rows > 1 else dim - self.routing.vote_columns
        if coordinates.dim() != 2 or len(coordinates) != children or coordinates.shape[1] > most:
            raise ValueError(
                f"expected coordinates as [{children}, at most {most}]; "
                f"got {list(coordinates.shape)}"
            )
        return coordinates

    def extra_repr(self) -> str:
        """Sizes and options, for `print(layer)`."""
        own, rows = self._structure, f"rows={self.rows}, " if self.rows > 1 else ""
        graph = (
            f"children={own.children}, parents={own.parents}, edges={own.edges}, " if own else ""
        )
        return f"{graph}weight={list(self.weight.shape)}, {rows}engine={self.engine!r}"


def _under_autocast(device_type: str) -> bool:
    known = torch.amp.is_autocast_available(device_type)  # not for meta
    return known and torch.is_autocast_enabled(device_type)


def _without_autocast(device_type: str) -> AbstractContextManager:
    under = _under_autocast(device_type)  # otherwise it would be in every trace
    return torch.autocast(device_type, enabled=False) if under else nullcontext()


def _check_finite(poses: Tensor, u: Tensor) -> None:
    """Raise if NaN or infinity in u reached the parents; do nothing where values are not available.

    Only the parents are checked first, which is cheap because they are few.
    """
    if u.device.type != "cpu" or is_traced(u, poses):
        return
    if poses.detach().sum().isfinite() or poses.isfinite().all():
        return
    not_finite = ~torch.isfinite(u).all(dim=-1)
    bad = int(not_finite.sum())
    if bad:
        raise NonFinitePosesError(
            f"{bad} of {not_finite.numel()} poses contain NaN or infinity; "
            "check the previous layer, or lower the learning rate"
        )
