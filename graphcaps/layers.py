"""Feature maps enter, poses leave; poses enter, capsules routed to their parents leave."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from graphcaps import kernels
from graphcaps._dgl import dgl
from graphcaps.functional import squash
from graphcaps.graph import batch_graph, check_structure, check_weight_index, is_complete
from graphcaps.passing import ENGINES, MessagePassing, bind
from graphcaps.routing import Iteration, Trace, dynamic_routing, uniform_routing
from graphcaps.votes import votes_along_edges, votes_on_complete_graph

ROUTINGS = ("dynamic", "uniform")
BATCH_SIZES_KEPT = 4  # those of training, evaluation, and the shorter last batch of each


class NonFinitePosesError(ValueError):
    """Poses with NaN or infinity reached a capsule layer."""


class PrimaryCapsules(nn.Module):
    """The first capsules: a convolution whose channels are grouped into poses, then squashed.

    The channels are `capsule_maps` groups of `capsule_dim`. A capsule is the channels of one
    group at one position; there is no ReLU before squash (Sabour et al. 2017, section 4).
    Capsules are ordered by map, then row, then column.

    Args:
        in_channels: channels of the feature maps that enter.
        capsule_maps: number of groups of channels.
        capsule_dim: length of a pose, K.
        kernel_size: of the convolution, in pixels.
        stride: of the convolution, in pixels.
        device, dtype: of the parameters, as in torch.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, number in (
            ("in_channels", in_channels),
            ("capsule_maps", capsule_maps),
            ("capsule_dim", capsule_dim),
        ):
            _check_at_least_1(name, number)
        self.capsule_maps = capsule_maps
        self.capsule_dim = capsule_dim
        self.conv = nn.Conv2d(
            in_channels,
            capsule_maps * capsule_dim,
            kernel_size,
            stride,
            device=device,
            dtype=dtype,
        )

    def forward(self, features: Tensor) -> Tensor:
        """Group the channels at every position into poses.

        Args:
            features: `[B, in_channels, H, W]`.

        Returns:
            Poses, `[B, I, K]`.

        Raises:
            ValueError: features of another shape, or smaller than the kernel.
        """
        channels, kernel = self.conv.in_channels, self.conv.kernel_size
        if (
            features.dim() != 4
            or features.shape[1] != channels
            or features.shape[2] < kernel[0]
            or features.shape[3] < kernel[1]
        ):
            raise ValueError(
                f"expected features of shape [batch, {channels}, at least {kernel[0]}, "
                f"at least {kernel[1]}]; got {list(features.shape)}"
            )
        # under autocast the convolution may be in bfloat16; capsules stay in the weights' dtype
        maps = self.conv(features).to(self.conv.weight.dtype)
        poses = maps.unflatten(1, (self.capsule_maps, self.capsule_dim))  # [B, maps, K, H, W]
        return squash(poses.permute(0, 1, 3, 4, 2).flatten(1, 3))


class CapsuleLayer(nn.Module):
    """Capsules over any bipartite graph: votes on its edges, routed to its parents.

    Every forward starts from equal coupling and keeps nothing of the last one; a sample never
    sees another. Votes and routing are computed in the dtype of `weight`, under autocast too.

    Args:
        graph: from `complete_graph` or `routing_graph`; not written on.
        child_dim: length of a child's pose, K.
        parent_dim: length of a parent's pose, D.
        routing: `"dynamic"`, or `"uniform"` for the control without routing.
        iterations: R, of dynamic routing; uniform routing has none.
        gradients: `"all"` lets gradients flow through every iteration, `"last"` through the
            last alone.
        engine: `"udf"`, `"builtin"` or `"scatter"` pass messages; `"fused"` is a kernel that never
            stores a vote, and gives no trace; `"auto"` takes the kernel where it applies and is
            the faster one. Second derivatives come from `"scatter"` alone. May be changed at any
            time, holds no parameters.
        device, dtype: of `weight`, as in torch.

    Attributes:
        weight: `[M, K, D]`, one matrix for each number in the graph's `weight_index`, drawn from
            N(0, 0.1²) as the authors do.

    Raises:
        ValueError: a graph of another kind, sizes or iterations below 1, an unknown name.

    >>> from graphcaps import complete_graph
    >>> layer = CapsuleLayer(complete_graph(1152, 10), child_dim=8, parent_dim=16)
    >>> layer(torch.rand(2, 1152, 8)).shape
    torch.Size([2, 10, 16])
    """

    def __init__(
        self,
        graph: dgl.DGLGraph,
        child_dim: int,
        parent_dim: int,
        *,
        routing: Literal["dynamic", "uniform"] = "dynamic",
        iterations: int = 3,
        gradients: Literal["all", "last"] = "all",
        engine: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_structure(graph)
        check_weight_index(graph)
        for name, number in (
            ("child_dim", child_dim),
            ("parent_dim", parent_dim),
            ("iterations", iterations),
        ):
            _check_at_least_1(name, number)
        for name, value, choices in (
            ("routing", routing, ROUTINGS),
            ("gradients", gradients, ("all", "last")),
            ("engine", engine, ("auto", "fused", *ENGINES)),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
        self.graph = graph
        self.routing = routing
        self.iterations = iterations
        self.gradients: Literal["all", "last"] = gradients
        self.engine = engine
        self._complete = is_complete(graph)
        self._bound: dict[tuple, MessagePassing] = {}
        self._edges: dict[torch.device, Any] = {}
        child, _ = graph.edges()
        weight_index = graph.edata["weight_index"]
        kinds = int(weight_index.max()) + 1 if graph.num_edges() else 0
        self._child: Tensor
        self.register_buffer("_child", child.long(), persistent=False)
        self._weight_index: Tensor
        self.register_buffer("_weight_index", weight_index, persistent=False)
        self.weight = nn.Parameter(
            torch.empty(kinds, child_dim, parent_dim, device=device, dtype=dtype)
        )
        self.to(self.weight.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `weight` anew from N(0, 0.1²)."""
        nn.init.normal_(self.weight, std=0.1)

    def forward(
        self, u: Tensor, graph: dgl.DGLGraph | None = None, *, return_trace: bool = False
    ) -> Tensor | tuple[Tensor, Trace]:
        """Route poses to the parents.

        Args:
            u: poses of the layer's own graph, `[B, I, K]`; or, with `graph`, of all its
                children, `[I, K]`.
            graph: another graph for this one call, whose `weight_index` points into `weight`:
                for ragged batches, made by `dgl.batch` from graphs of any sizes.
            return_trace: give what every iteration computed, too.

        Returns:
            Parents, `[B, J, D]`; with `graph`, `[J, D]`. With `return_trace`, these and a `Trace`.

        Raises:
            ValueError: poses that do not fit graph and weight in shape, dtype or device, or (on
                the CPU, where looking does not make the device wait) hold NaN or infinity; a
                trace asked of engine `"fused"`.
            RuntimeError: an engine that cannot run on the device of `u`.
        """
        if self.routing not in ROUTINGS:
            raise ValueError(
                f"unknown routing {self.routing!r}; choose one of {', '.join(ROUTINGS)}"
            )
        if graph is not None:
            check_structure(graph)
            check_weight_index(graph, kinds=len(self.weight))
        self._check_poses(u, graph)
        structure, samples = (self.graph, len(u)) if graph is None else (graph, 1)
        if self._takes_the_kernel(u, samples, return_trace):
            return self._routed_by_the_kernel(u, graph)
        with torch.autocast(u.device.type, enabled=False):
            if graph is None:
                passing, u_hat = self._passing(samples, u.device), self._votes(u)
            else:
                passing, u_hat = bind(graph, self.engine, u.device), self._votes_on(graph, u)
            kept = []
            for iteration in self._iterations(passing, u_hat):
                v = iteration.v
                if return_trace:
                    kept.append(iteration)
        if graph is None:
            v = v.unflatten(0, (samples, structure.num_nodes("parent")))
        return (v, Trace.of(structure, samples, u_hat, kept)) if return_trace else v

    def _votes(self, u: Tensor) -> Tensor:
        if self._complete:
            return votes_on_complete_graph(u, self.weight)
        return votes_along_edges(u, self.weight, self._child, self._weight_index)

    def _votes_on(self, graph: dgl.DGLGraph, u: Tensor) -> Tensor:
        child, _ = graph.edges()
        index = graph.edata["weight_index"].to(u.device)
        return votes_along_edges(
            u.unsqueeze(0), self.weight, child.to(u.device, torch.int64), index
        )

    def _iterations(self, passing: MessagePassing, u_hat: Tensor) -> Iterator[Iteration]:
        if self.routing == "uniform":
            return uniform_routing(passing, u_hat)
        return dynamic_routing(passing, u_hat, self.iterations, self.gradients)

    def _takes_the_kernel(self, u: Tensor, samples: int, return_trace: bool) -> bool:
        if self.engine not in ("auto", "fused"):
            return False
        if kernels.choose_engine(self.engine, u.device, u.dtype, samples) != "fused":
            return False
        if self.engine == "auto":
            return not return_trace
        if return_trace:
            raise ValueError(
                "engine 'fused' never has the votes that a trace is made of; use engine='auto', "
                "which takes another one for a trace"
            )
        return True

    def _routed_by_the_kernel(self, u: Tensor, graph: dgl.DGLGraph | None) -> Tensor:
        # the first iteration couples uniformly
        iterations = 1 if self.routing == "uniform" else self.iterations
        with torch.autocast(u.device.type, enabled=False):
            if graph is not None:
                edges = kernels.prepare(graph, len(self.weight), u.device)
                return kernels.routed(
                    u.unsqueeze(0), self.weight, edges, iterations, self.gradients
                ).squeeze(0)
            if u.device not in self._edges:
                self._edges[u.device] = kernels.prepare(self.graph, len(self.weight), u.device)
            edges = self._edges[u.device]
            return kernels.routed(u, self.weight, edges, iterations, self.gradients)

    def _passing(self, batch_size: int, device: torch.device) -> MessagePassing:
        key = (batch_size, device, self.engine)
        passing = self._bound.pop(key, None)
        if passing is None:
            passing = bind(batch_graph(self.graph, batch_size), self.engine, device)
        self._bound[key] = passing  # the last used stands last
        for oldest in list(self._bound)[:-BATCH_SIZES_KEPT]:
            self._bound.pop(oldest, None)
        return passing

    def _check_poses(self, u: Tensor, graph: dgl.DGLGraph | None) -> None:
        child_dim = self.weight.shape[1]
        if graph is None:
            children = self.graph.num_nodes("child")
            fits = u.dim() == 3 and u.shape[1:] == (children, child_dim)
            expected = f"[batch, {children}, {child_dim}]"
        else:
            children = graph.num_nodes("child")
            fits = u.shape == (children, child_dim)
            expected = f"[{children}, {child_dim}]"
        if not fits:
            raise ValueError(
                f"the graph has {children} children with poses of length {child_dim}: "
                f"expected u of shape {expected}, got {list(u.shape)}"
            )
        if u.dtype != self.weight.dtype or u.device != self.weight.device:
            raise ValueError(
                f"u and weight must have one dtype and one device; got u in {u.dtype} on "
                f"{u.device} and weight in {self.weight.dtype} on {self.weight.device}; "
                "use u.to(layer.weight)"
            )
        if u.device.type == "cpu" and not _all_finite(u):
            bad = int((~torch.isfinite(u)).any(dim=-1).sum())
            raise NonFinitePosesError(
                f"{bad} of {u[..., 0].numel()} poses hold NaN or infinity; "
                "look at the layer before, or lower the learning rate"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": {}, "_edges": {}}  # rebuilt on demand

    def extra_repr(self) -> str:
        """Sizes and choices, for `print(layer)`."""
        return (
            f"children={self.graph.num_nodes('child')}, parents={self.graph.num_nodes('parent')}, "
            f"edges={self.graph.num_edges()}, weight={list(self.weight.shape)}, "
            f"routing={self.routing!r}, iterations={self.iterations}, engine={self.engine!r}"
        )


def _all_finite(u: Tensor) -> bool:
    # A sum is not finite if a number is not, and faster to look at. By numpy, where it has the
    # dtype: torch's threads would keep a core busy for a while, which the kernel could use.
    u = u.detach()
    with np.errstate(over="ignore", invalid="ignore"):
        total = u.sum() if u.dtype == torch.bfloat16 else torch.tensor(u.numpy().sum())
    return bool(total.isfinite() or u.isfinite().all())


def _check_at_least_1(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name} must be at least 1; got {number}")
