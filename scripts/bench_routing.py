"""Sizes of a capsule layer enter; time and memory of every form of it leave.

The forms are dense routing, eager and compiled, and each engine. Every form is first compared with
dense routing in float64, output and gradients; one that is wrong is not timed. Times are taken in
one process, form after form in every round; memory in a process of its own for each form.

    python scripts/bench_routing.py --output benchmarks/routing-cpu.json     # everything
    python scripts/bench_routing.py --short                                  # under 2 minutes
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from measuring import alternating, in_own_process, machine, peak_mib, quartiles, write
from torch import Tensor
from torch.nn import Parameter

import graphcaps as gc
from graphcaps._dgl import dgl

FORMS = ("dense", "compiled", "udf", "builtin", "scatter", "fused")
MODES = ("inference", "forward", "forward+backward")
ALLOWED_ERROR = 1e-4  # relative to the largest value; float32 has 1e-7 for one operation
MEBI = 2**20


@dataclass(frozen=True)
class Layer:
    """A capsule layer, votes and routing."""

    batch: int = 64
    children: int = 1152
    parents: int = 10
    child_dim: int = 8
    parent_dim: int = 16
    iterations: int = 3
    kept: float = 1.0
    """Share of the edges of the complete graph, drawn at random."""


@dataclass(frozen=True)
class Options:
    """Compare the engines of graphcaps with dense routing."""

    layer: Layer = Layer()
    short: bool = False
    """The layer alone: no sweeps, no large layer, a third of the rounds."""
    threads: int = 2
    """Of torch and of DGL."""
    device: str = "cpu"
    """cpu or cuda."""
    rounds: int = 15
    """How often each form is timed."""
    output: Path | None = None
    """A JSON file for all figures."""
    memory_of: str | None = None
    """Print the peak memory of a form alone, in every mode; used by this script itself."""


LARGE = Layer(batch=128, children=3872, parents=196)
SWEEPS: dict[str, tuple[Any, ...]] = {
    "batch": (1, 4, 16, 32, 64, 128, 256),
    "children": (144, 288, 576, 1152, 2304),
    "iterations": (1, 2, 3, 5),
    "kept": (1.0, 0.5, 0.25, 0.1),
}
SWEPT = ("dense", "builtin", "fused")


def make_graph(layer: Layer) -> dgl.DGLGraph:
    """The complete graph, or so many of its edges, each with a matrix of its own."""
    if layer.kept == 1:
        return gc.complete_graph(layer.children, layer.parents)
    every = layer.children * layer.parents
    generator = torch.Generator().manual_seed(1)
    edges = torch.randperm(every, generator=generator)[: round(layer.kept * every)].sort().values
    return gc.routing_graph(
        edges // layer.parents,
        edges % layer.parents,
        children=layer.children,
        parents=layer.parents,
    )


def make_form(
    form: str, layer: Layer, graph: dgl.DGLGraph, weight: Parameter
) -> Callable[[Tensor], Tensor]:
    """The layer as a function of poses `[B, I, K]`, which gives `[B, J, D]`."""
    if form in ("dense", "compiled"):
        child, parent = (ends.long().to(weight.device) for ends in graph.edges())
        mask = torch.zeros(layer.children, layer.parents, dtype=torch.bool, device=weight.device)
        mask[child, parent] = True

        def dense(u: Tensor) -> Tensor:
            if layer.kept == 1:
                votes = gc.reference.votes(u, weight.unflatten(0, mask.shape))
                return gc.reference.dynamic_routing(votes, layer.iterations)[0]
            matrices = weight.new_zeros(*mask.shape, *weight.shape[1:])
            matrices = matrices.index_put((child, parent), weight)
            votes = gc.reference.votes(u, matrices)
            return gc.reference.dynamic_routing(votes, layer.iterations, mask=mask)[0]

        return dense if form == "dense" else torch.compile(dense)
    capsules = gc.CapsuleLayer(
        graph,
        layer.child_dim,
        layer.parent_dim,
        iterations=layer.iterations,
        engine=form,
        dtype=weight.dtype,
        device=weight.device,
    )
    capsules.weight = weight
    return capsules


def make_input(
    layer: Layer, edges: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Parameter]:
    """Squashed poses and the matrices, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    poses = torch.randn(layer.batch, layer.children, layer.child_dim, generator=generator)
    weight = torch.randn(edges, layer.child_dim, layer.parent_dim, generator=generator)
    poses, weight = gc.squash(poses).to(device, dtype), (0.1 * weight).to(device, dtype)
    return poses.requires_grad_(), Parameter(weight)


def run(function: Callable[[Tensor], Tensor], u: Tensor, weight: Parameter, mode: str) -> Tensor:
    """One forward for its result alone, one that could be differentiated, or one that is."""
    u.grad = weight.grad = None
    if mode == "inference":
        with torch.no_grad():
            return function(u)
    v = function(u)
    if mode == "forward+backward":
        v.square().sum().backward()
    return v


def errors(layer: Layer, graph: dgl.DGLGraph, forms: Iterator[str], device: str) -> dict[str, Any]:
    """The largest error of output and gradients, relative to the largest value; or why not."""
    small = replace(layer, batch=min(layer.batch, 8))  # samples are routed apart

    def found(form: str, dtype: torch.dtype) -> list[Tensor]:
        u, weight = make_input(small, graph.num_edges(), device, dtype)
        v = run(make_form(form, small, graph, weight), u, weight, "forward+backward")
        assert u.grad is not None and weight.grad is not None
        return [v.detach(), u.grad, weight.grad]

    truth = found("dense", torch.float64)
    said: dict[str, Any] = {}
    for form in forms:
        try:
            pairs = zip(found(form, torch.float32), truth, strict=True)
            said[form] = max(
                float((x - right).abs().max() / right.abs().max()) for x, right in pairs
            )
        except Exception as problem:  # a compiler or a GPU that is not there: said, not hidden
            said[form] = f"cannot run: {str(problem).strip().splitlines()[0]}"
    return said


def measure(
    layer: Layer, forms: tuple[str, ...], modes: tuple[str, ...], options: Options
) -> dict[str, Any]:
    """Every form that is right, in every mode: seconds of each round."""
    graph = make_graph(layer)
    wrong = errors(layer, graph, iter(forms), options.device)
    right = [f for f in forms if isinstance(wrong[f], float) and wrong[f] <= ALLOWED_ERROR]
    u, weight = make_input(layer, graph.num_edges(), options.device)
    functions = {form: make_form(form, layer, graph, weight) for form in right}
    seconds = {}
    for mode in modes:
        calls = {f: _call(function, u, weight, mode) for f, function in functions.items()}
        seconds[mode] = alternating(calls, options.rounds)
    return {"layer": asdict(layer), "relative_error": wrong, "seconds": seconds}


def measure_kept(form: str, mode: str, options: Options) -> dict[str, list[float]]:
    """One form on graphs with ever fewer edges, one after the other in every round."""
    calls = {}
    for share in SWEEPS["kept"]:
        layer = replace(options.layer, kept=share)
        graph = make_graph(layer)
        u, weight = make_input(layer, graph.num_edges(), options.device)
        calls[str(share)] = _call(make_form(form, layer, graph, weight), u, weight, mode)
    return alternating(calls, options.rounds)


def _call(
    function: Callable[[Tensor], Tensor], u: Tensor, weight: Parameter, mode: str
) -> Callable[[], Tensor]:
    return lambda: run(function, u, weight, mode)


def peak_memory(form: str, mode: str, layer: Layer, device: str) -> float:
    """MiB that one run needs beyond its inputs, its output and its gradients."""
    graph = make_graph(layer)
    u, weight = make_input(layer, graph.num_edges(), device)
    function = make_form(form, layer, graph, weight)
    run(function, u, weight, mode)  # libraries load, and code that is compiled for this size
    u.grad = weight.grad = None
    results = layer.batch * layer.parents * layer.parent_dim
    if mode == "forward+backward":
        results += u.numel() + weight.numel()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(function, u, weight, mode)
        return (torch.cuda.max_memory_allocated() - before - 4 * results) / MEBI
    return peak_mib(lambda: run(function, u, weight, mode)) - 4 * results / MEBI


def peaks_apart(form: str, layer: Layer, options: Options) -> dict[str, float]:
    """The same for every mode, in a process of its own."""
    sizes = [f"--layer.{name.replace('_', '-')}={n}" for name, n in asdict(layer).items()]
    printed = in_own_process(
        __file__,
        *sizes,
        f"--threads={options.threads}",
        f"--device={options.device}",
        f"--memory-of={form}",
    )
    return dict(zip(MODES, map(float, printed.split()[-len(MODES) :]), strict=True))


def table(results: dict[str, Any]) -> str:
    """The layer's figures as Markdown: medians, quartiles, ratios to the eager dense form."""
    lines = [
        "| form | inference | × dense | forward + backward | × dense "
        "| peak memory, inference | forward + backward |",
        "|---|---|---|---|---|---|---|",
    ]
    seconds, peaks = results["seconds"], results["peak_mib"]
    for form, error in results["relative_error"].items():
        if form not in peaks:
            lines.append(f"| {form} | {error if isinstance(error, str) else 'wrong'} |||||||")
            continue
        cells = [form]
        for mode in ("inference", "forward+backward"):
            low, middle, high = (1e3 * q for q in quartiles(seconds[mode][form]))
            ratio = middle / 1e3 / quartiles(seconds[mode]["dense"])[1]
            cells += [f"{middle:.0f} ms ({low:.0f} to {high:.0f})", f"{ratio:.2f}"]
        cells += [f"{peaks[form][mode]:.0f} MiB" for mode in ("inference", "forward+backward")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe(layer: dict[str, Any]) -> str:
    """A layer in words."""
    return (
        f"{layer['children']} → {layer['parents']} capsules, {layer['child_dim']} → "
        f"{layer['parent_dim']}, {layer['iterations']} iterations, batch {layer['batch']}"
    )


def main() -> None:
    """Measure, print, write the JSON."""
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        for mode in MODES:
            print(peak_memory(options.memory_of, mode, options.layer, options.device))
        return
    if options.short:
        options = replace(options, rounds=max(2, options.rounds // 3))
    results: dict[str, Any] = {"machine": machine(options.threads), "rounds": options.rounds}
    results |= measure(options.layer, FORMS, MODES, options)
    right = results["seconds"]["inference"]
    results["peak_mib"] = {form: peaks_apart(form, options.layer, options) for form in right}
    print(describe(results["layer"]), results["machine"], "\n", table(results), sep="\n")
    if not options.short:
        results["sweeps"] = {
            name: [
                measure(replace(options.layer, **{name: value}), SWEPT, MODES[::2], options)
                for value in values
            ]
            for name, values in SWEEPS.items()
        }
        results["kept"] = measure_kept("fused", MODES[-1], options)
        few = replace(options, rounds=2)
        results["large"] = measure(LARGE, ("fused",), MODES[::2], few) | {
            "peak_mib": peaks_apart("fused", LARGE, options)
        }
        print(f"\n{describe(asdict(LARGE))}, fused:", results["large"]["peak_mib"], "MiB")
    if options.output is not None:
        write(options.output, results)


if __name__ == "__main__":
    main()
