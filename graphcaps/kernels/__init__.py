"""Kernels that route from poses and matrices to parents without storing votes or logits.

The derivation is in README.md beside this file. `cpu/` has the kernels for the CPU, `triton/` those
for CUDA; this file chooses between them.
"""

from typing import Literal

import torch
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.graph import check_weight_index
from graphcaps.kernels import cpu, ops, triton
from graphcaps.kernels.cpu import Edges
from graphcaps.kernels.triton import TritonEdges
from graphcaps.kernels.votes import Votes, check_votes, names

__all__ = ["Edges", "TritonEdges", "Votes", "prepare", "routed", "why_not"]


@torch.compiler.assume_constant_result  # torch.compile calls it once and does not trace it
def why_not(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why no kernel can route features of `dtype` on `device`, or None if one can.

    >>> why_not(torch.device("cpu"), torch.bfloat16)
    'it computes in float32 and float64, not in torch.bfloat16'
    """
    kernel = cpu if device.type == "cpu" else triton
    if dtype not in kernel.DTYPES:
        return f"it computes in {names(kernel.DTYPES, ' and ')}, not in {dtype}"
    return kernel.why_not(device)


def prepare(graph: dgl.DGLGraph, kinds: int, device: torch.device) -> Edges | TritonEdges:
    """Return a graph's edges in the form that the kernel for `device` takes.

    The result does not depend on the batch, and kernels only read it.

    Args:
        graph: from `routing_graph`, `complete_graph` or `dgl.batch` of such.
        kinds: number of matrices, M.
        device: a device for which `why_not` returns None.

    Raises:
        ValueError: the graph refers to more matrices than there are.
    """
    check_weight_index(graph, kinds)
    if device.type in ("cpu", "meta"):
        return cpu.prepare(graph, kinds, device)
    return TritonEdges.of(graph, kinds, device)


def routed(
    u: Tensor,
    weight: Tensor,
    edges: Edges | TritonEdges,
    iterations: int,
    gradients: Literal["all", "last"] = "all",
) -> Tensor:
    """Dynamic routing (Sabour et al. 2017, procedure 1) without storing the votes.

    Only first derivatives are implemented: for second derivatives, autograd raises RuntimeError.
    Equal calls give bitwise equal results, on the CPU if the number of threads is the same.

    Args:
        u: poses, `[B, I, K]`; float32, on the CPU also float64, on CUDA also bfloat16.
        weight: matrices, `[M, K, D]`, in the dtype and on the device of `u`.
        edges: from `prepare`, on the device of `u`.
        iterations: R, at least 1; with 1, this is uniform routing.
        gradients: `"all"` lets gradients flow through every iteration, `"last"` only through the
            last.

    Returns:
        Parents, `[B, J, D]`, in the dtype of `u`.

    Raises:
        ValueError: shapes, dtypes or devices do not match, `iterations` is below 1, or
            `gradients` is neither `"all"` nor `"last"`.
        RuntimeError: the kernel cannot run on this device; `why_not` says why.

    >>> from graphcaps import complete_graph
    >>> edges = prepare(complete_graph(6, 3), kinds=18, device=torch.device("cpu"))
    >>> routed(torch.rand(2, 6, 4), torch.rand(18, 4, 5), edges, iterations=3).shape
    torch.Size([2, 3, 5])
    """
    check_votes(u, weight, edges)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    if gradients not in ("all", "last"):
        raise ValueError(f"unknown gradients {gradients!r}; choose all or last")
    complete = isinstance(edges, TritonEdges) and edges.complete
    v, *_ = ops.run_dynamic_routing(
        u, weight, edges.tensors, edges.parents, complete, iterations, gradients == "all"
    )
    return v
