"""Chooses the engine that routes, and explains why others cannot."""

import torch

from graphcaps import kernels
from graphcaps._dgl import dgl
from graphcaps.conversion import EdgeTypes
from graphcaps.graph import VOTES
from graphcaps.passing import ENGINES as WITH_VOTES
from graphcaps.passing import MessagePassing
from graphcaps.routing import Routing
from graphcaps.structure import Structure

ENGINES = ("fused", *WITH_VOTES)
PREFERRED = ("fused", "builtin", "scatter")  # the order in which "auto" tries them


def why_not(
    engine: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    routing: Routing | None = None,
    structure: Structure | None = None,
    trace: bool = False,
) -> str | None:
    """Return why an engine cannot route, or None if it can.

    Args:
        engine: a name in `ENGINES`.
        device: the device of the poses.
        dtype: the dtype of the computation.
        routing: the routing; any if not given.
        structure: the graph; any if not given.
        trace: whether a trace is requested.

    Raises:
        ValueError: an unknown name.

    >>> why_not("fused", torch.device("cpu"), trace=True)
    'it stores no votes, and a trace is made of them'
    """
    check_engine(engine, named=True)
    if engine != "fused":
        return WITH_VOTES[engine].why_not(device)
    if trace:
        return "it stores no votes, and a trace is made of them"
    if routing is not None and routing.needs_votes:
        return f"{routing.name} routing asks for the votes, and it stores none"
    if device.type != "cpu" and structure is not None and not structure.by_child:
        return "its kernels know no competition but that of the edges of a child"
    return kernels.why_not(device, dtype)


def choose(
    engine: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    routing: Routing | None = None,
    structure: Structure | None = None,
    trace: bool = False,
) -> str:
    """Return the engine to use: the named one, or for `"auto"` the fastest that can run.

    Args:
        engine: `"auto"` or a name in `ENGINES`.
        device, dtype, routing, structure, trace: as for `why_not`.

    Returns:
        A name in `ENGINES`.

    Raises:
        ValueError: the name is unknown, or the engine cannot record the requested trace.
        RuntimeError: the named engine cannot run; the message gives the reason.

    >>> [choose("auto", torch.device("cpu"), trace=trace) for trace in (False, True)]
    ['fused', 'builtin']
    """
    check_engine(engine)
    reasons = {
        name: why_not(name, device, dtype, routing=routing, structure=structure, trace=trace)
        for name in (PREFERRED if engine == "auto" else (engine,))
    }
    if engine == "auto":
        return next(name for name, reason in reasons.items() if reason is None)
    if reasons[engine] is not None:
        error = ValueError if trace and engine == "fused" else RuntimeError
        raise error(
            f"engine {engine!r} cannot run on {device}: {reasons[engine]}. "
            "Use engine='auto', or 'scatter', which only needs torch."
        )
    return engine


def bind(
    graph: dgl.DGLGraph,
    engine: str = "auto",
    device: torch.device | str = "cpu",
    *,
    etype: EdgeTypes | None = None,
) -> MessagePassing:
    """Prepare a batched graph for message passing on a device.

    Args:
        graph: from `batch_graph`, `dgl.batch` or `routing_graph`, or any DGL graph.
        engine: `"auto"`, `"udf"`, `"builtin"` or `"scatter"`.
        device: the device of the features.
        etype: the edge types that vote, see `CapsuleLayer`.

    Returns:
        The operations on this graph.

    Raises:
        ValueError: the graph lacks the edge types, or the engine is unknown or `"fused"`, which has
            no votes.
        RuntimeError: the engine cannot run on the device.

    >>> from graphcaps import complete_graph
    >>> bind(complete_graph(children=6, parents=3), "udf").structure.edges
    18
    """
    device = torch.device(device)
    name = choose(engine, device, trace=True)  # needs votes, as a trace does
    if isinstance(graph, dgl.DGLGraph) and graph.canonical_etypes == [VOTES]:
        graph = graph.local_var()  # one of `batch_graph` has no weight_index, nor is it needed here
        graph.edata["weight_index"] = torch.zeros(graph.num_edges(), dtype=torch.int64)
    return WITH_VOTES[name](Structure(graph, etype=etype), 1, device)


def check_engine(engine: str, *, named: bool = False) -> None:
    """Raise ValueError for an unknown engine; `"auto"` is allowed unless `named`."""
    choices = ENGINES if named else ("auto", *ENGINES)
    if engine not in choices:
        raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(choices)}")
