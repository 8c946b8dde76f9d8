"""A batched graph and the name of an engine enter; four verbs of message passing leave.

An engine is how a message is passed, never what is computed: each gives the same numbers, has no
parameters, and writes nothing on the graph. Features enter and leave as plain tensors, edge
features `[B·E, ·]` in the order of the edges, parent features `[B·J, ·]`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from graphcaps._dgl import dgl
from graphcaps.graph import check_structure
from graphcaps.passing.builtin import BuiltinEngine
from graphcaps.passing.scatter import ScatterEngine
from graphcaps.passing.udf import UdfEngine


class MessagePassing(Protocol):
    """The four verbs, on one batched graph."""

    edges: int  # B·E

    def __init__(self, graph: dgl.DGLGraph, device: torch.device) -> None:
        """Hold what the verbs need of `graph` on `device`."""

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """Why this engine cannot run on `device`, or None where it can."""

    def softmax_over_parents(self, b: Tensor) -> Tensor:
        """`c_e = exp b_e / Σ exp b` over the edges of the same child: `[B·E, 1]` to `[B·E, 1]`."""

    def sum_into_parents(
        self, c: Tensor, u_hat: Tensor, node_function: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`s_j = Σ_i c_ij û_ij` and `v_j = node_function(s_j)`, both `[B·J, D]`.

        A parent without children has s = 0.
        """

    def agreement(self, u_hat: Tensor, v: Tensor) -> Tensor:
        """`û_ij · v_j` on every edge, `[B·E, 1]`."""

    def expand_to_edges(self, v: Tensor) -> Tensor:
        """The parent's feature on each of its edges: `[B·J, D]` to `[B·E, D]`."""


ENGINES: dict[str, type[MessagePassing]] = {
    "udf": UdfEngine,
    "builtin": BuiltinEngine,
    "scatter": ScatterEngine,
}


def choose_engine(engine: str, device: torch.device) -> str:
    """The engine that runs: the one named, or with `"auto"` the fastest that can.

    Args:
        engine: `"auto"`, `"udf"`, `"builtin"` or `"scatter"`.
        device: where the features are.

    Returns:
        A name in `ENGINES`.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a named engine that cannot run on this device, with the reason.

    >>> choose_engine("auto", torch.device("cpu"))
    'builtin'
    """
    if engine == "auto":
        return "builtin" if BuiltinEngine.why_not(device) is None else "scatter"
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose auto, {', '.join(ENGINES)}")
    reason = ENGINES[engine].why_not(device)
    if reason is not None:
        raise RuntimeError(
            f"engine {engine!r} cannot run on {device}: {reason}. "
            "Use engine='scatter', which needs torch alone, or 'auto'."
        )
    return engine


def bind(
    graph: dgl.DGLGraph, engine: str = "auto", device: torch.device | str = "cpu"
) -> MessagePassing:
    """Make a batched graph ready for message passing on a device.

    Args:
        graph: from `batch_graph`, `dgl.batch` or `routing_graph`.
        engine: see `choose_engine`.
        device: where the features are.

    Returns:
        The four verbs on this graph.

    Raises:
        ValueError: a graph of another kind; an unknown engine.
        RuntimeError: an engine that cannot run on the device.

    >>> from graphcaps import complete_graph
    >>> bind(complete_graph(children=6, parents=3), "udf").edges
    18
    """
    check_structure(graph)
    device = torch.device(device)
    return ENGINES[choose_engine(engine, device)](graph, device)
