"""Which engine routes: the one door at which it is chosen, and says why another cannot."""

import torch

from graphcaps import kernels
from graphcaps._dgl import dgl
from graphcaps.graph import check_structure
from graphcaps.passing import ENGINES as WITH_VOTES
from graphcaps.passing import MessagePassing
from graphcaps.routing import Routing
from graphcaps.structure import Structure

ENGINES = ("fused", *WITH_VOTES)
PREFERRED = ("fused", "builtin", "scatter")  # by "auto", in this order
FEWEST_SAMPLES = 8  # below, the lanes of the kernel on the CPU stay empty


def why_not(
    engine: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    routing: Routing | None = None,
    structure: Structure | None = None,
    trace: bool = False,
) -> str | None:
    """Why an engine cannot route, or None where it can.

    Args:
        engine: a name in `ENGINES`.
        device: where the poses are.
        dtype: that is computed in.
        routing: what is to be routed; any, if not given.
        structure: on which graph; on any, if not given.
        trace: whether a trace is asked for.

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
    if structure is not None and not structure.by_child:
        return "its kernels know no competition but that of the edges of a child"
    return kernels.why_not(device, dtype)


def choose(
    engine: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    routing: Routing | None = None,
    structure: Structure | None = None,
    samples: int | None = None,
    trace: bool = False,
) -> str:
    """The engine that runs: the one named, or with `"auto"` the fastest that can.

    Args:
        engine: `"auto"` or a name in `ENGINES`.
        device, dtype, routing, structure, trace: as for `why_not`.
        samples: how many are routed at once; enough for a kernel, if not given.

    Returns:
        A name in `ENGINES`.

    Raises:
        ValueError: an unknown name; a trace asked of an engine that cannot give one.
        RuntimeError: a named engine that cannot run, with the reason.

    >>> [choose("auto", torch.device("cpu"), samples=samples) for samples in (64, 1)]
    ['fused', 'builtin']
    """
    check_engine(engine)
    reasons = {
        name: why_not(name, device, dtype, routing=routing, structure=structure, trace=trace)
        for name in (PREFERRED if engine == "auto" else (engine,))
    }
    if engine == "auto":
        few = samples is not None and samples < FEWEST_SAMPLES and device.type == "cpu"
        able = [name for name, reason in reasons.items() if reason is None]
        return able[1] if few and able[0] == "fused" and len(able) > 1 else able[0]
    if reasons[engine] is not None:
        error = ValueError if trace and engine == "fused" else RuntimeError
        raise error(
            f"engine {engine!r} cannot run on {device}: {reasons[engine]}. "
            "Use engine='auto', or 'scatter', which needs torch alone."
        )
    return engine


def bind(
    graph: dgl.DGLGraph, engine: str = "auto", device: torch.device | str = "cpu"
) -> MessagePassing:
    """Make a batched graph ready for message passing on a device.

    Args:
        graph: from `batch_graph`, `dgl.batch` or `routing_graph`.
        engine: `"auto"`, `"udf"`, `"builtin"` or `"scatter"`.
        device: where the features are.

    Returns:
        The operations on this graph.

    Raises:
        ValueError: a graph of another kind; an unknown engine, or `"fused"`, which has no votes.
        RuntimeError: an engine that cannot run on the device.

    >>> from graphcaps import complete_graph
    >>> bind(complete_graph(children=6, parents=3), "udf").structure.edges
    18
    """
    check_structure(graph)
    device = torch.device(device)
    name = choose(engine, device, trace=True)  # of votes, as a trace is
    if "weight_index" not in graph.edata:  # as of `batch_graph`; votes are given, not computed
        graph = graph.local_var()
        graph.edata["weight_index"] = torch.zeros(graph.num_edges(), dtype=torch.int64)
    return WITH_VOTES[name](Structure(graph), 1, device)


def check_engine(engine: str, *, named: bool = False) -> None:
    """Raise ValueError for a name that no engine has; `"auto"` is one unless `named`."""
    choices = ENGINES if named else ("auto", *ENGINES)
    if engine not in choices:
        raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(choices)}")
