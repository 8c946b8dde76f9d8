"""Poses, matrices and a graph enter, routed capsules leave; votes and logits are never stored.

The derivation is in README.md beside this file. A kernel serves one kind of device: here is where
it is chosen.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graphcaps import passing
from graphcaps._dgl import dgl
from graphcaps.graph import check_weight_index
from graphcaps.kernels import dynamic_cpu, dynamic_triton
from graphcaps.kernels.dynamic_cpu import Edges
from graphcaps.kernels.dynamic_triton import TritonEdges


def why_not(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why no kernel can route features of `dtype` on `device`, or None where one can.

    >>> why_not(torch.device("cpu"), torch.bfloat16)
    'it computes in float32 and float64, not in torch.bfloat16'
    """
    if torch.compiler.is_compiling():
        return "torch.compile cannot look into it; compile the modules around the layer"
    kernel = dynamic_cpu if device.type == "cpu" else dynamic_triton
    if dtype not in kernel.DTYPES:
        return f"it computes in {_names(kernel.DTYPES, ' and ')}, not in {dtype}"
    return kernel.why_not(device)


def choose_engine(
    engine: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    samples: int | None = None,
) -> str:
    """The engine that takes a batch: `"fused"`, or one of `passing`.

    Args:
        engine: `"auto"`, `"fused"`, or a name in `passing.ENGINES`.
        device: where the features are.
        dtype: of the features.
        samples: how many are routed at once; enough for a kernel, if not given.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a named engine that cannot run, with the reason.

    >>> choose_engine("fused", torch.device("cpu"))
    'fused'
    """
    reason = why_not(device, dtype)
    if engine == "fused" and reason is not None:
        raise RuntimeError(f"engine 'fused' cannot run on {device}: {reason}. Use engine='auto'.")
    few = samples is not None and samples < _fewest_samples(device)
    if engine == "fused" or (engine == "auto" and reason is None and not few):
        return "fused"
    return passing.choose_engine(engine, device)


def _fewest_samples(device: torch.device) -> int:
    """With fewer samples than this, passing messages is faster."""
    return 8 if device.type == "cpu" else 1  # lanes on the CPU would stay empty


def prepare(graph: dgl.DGLGraph, kinds: int, device: torch.device) -> Edges | TritonEdges:
    """What the kernel for `device` needs of a graph, whatever the batch; not written on.

    Args:
        graph: from `routing_graph`, `complete_graph` or `dgl.batch` of such.
        kinds: number of matrices, M.
        device: one for which `why_not` gives None.

    Raises:
        ValueError: the graph wants more matrices.
    """
    check_weight_index(graph, kinds)
    if device.type == "cpu":
        return dynamic_cpu.prepare(graph, kinds)
    return TritonEdges.of(graph, kinds, device)


def routed(
    u: Tensor,
    weight: Tensor,
    edges: Edges | TritonEdges,
    iterations: int,
    gradients: Literal["all", "last"] = "all",
) -> Tensor:
    """Dynamic routing (Sabour et al. 2017, procedure 1) of votes that are never stored.

    Has first derivatives alone; asked for the second, autograd raises RuntimeError. Equal calls
    give equal bits, on the CPU with the same number of threads.

    Args:
        u: poses, `[B, I, K]`; float32, on the CPU also float64, on CUDA also bfloat16.
        weight: matrices, `[M, K, D]`, in the dtype and on the device of `u`.
        edges: from `prepare`, on the device of `u`.
        iterations: R, at least 1; with 1, this is uniform routing.
        gradients: `"all"` lets gradients flow through every iteration, `"last"` through the last
            alone.

    Returns:
        Parents, `[B, J, D]`, in the dtype of `u`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, iterations below 1, another word
            for `gradients`.
        RuntimeError: the kernel cannot run on this device; `why_not` says why.

    >>> from graphcaps import complete_graph
    >>> edges = prepare(complete_graph(6, 3), kinds=18, device=torch.device("cpu"))
    >>> routed(torch.rand(2, 6, 4), torch.rand(18, 4, 5), edges, iterations=3).shape
    torch.Size([2, 3, 5])
    """
    _check(u, weight, edges, iterations, gradients)
    if isinstance(edges, TritonEdges):
        return dynamic_triton.routed(u, weight, edges, iterations, gradients)
    return dynamic_cpu.DynamicRouting.apply(u, weight, edges, iterations, gradients)


def _check(
    u: Tensor, weight: Tensor, edges: Edges | TritonEdges, iterations: int, gradients: str
) -> None:
    """Neither kernel looks again where it reads and writes."""
    if u.dim() != 3 or u.shape[1] != edges.children:
        raise ValueError(f"expected u as [batch, {edges.children}, K]; got {list(u.shape)}")
    if weight.dim() != 3 or weight.shape[:2] != (edges.kinds, u.shape[2]):
        raise ValueError(
            f"expected weight as [{edges.kinds}, {u.shape[2]}, D]; got {list(weight.shape)}"
        )
    kernel = dynamic_triton if isinstance(edges, TritonEdges) else dynamic_cpu
    if u.dtype not in kernel.DTYPES or weight.dtype != u.dtype:
        raise ValueError(
            f"expected u and weight both in {_names(kernel.DTYPES, ' or both in ')}; "
            f"got {u.dtype} and {weight.dtype}"
        )
    device = edges.by_child.start.device
    if not u.device == weight.device == device:
        raise ValueError(
            f"u is on {u.device}, weight on {weight.device}, edges on {device}; "
            "move all to one device"
        )
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    if gradients not in ("all", "last"):
        raise ValueError(f"unknown gradients {gradients!r}; choose all or last")


def _names(dtypes: Sequence[torch.dtype], between: str) -> str:
    return between.join(str(dtype).removeprefix("torch.") for dtype in dtypes)
