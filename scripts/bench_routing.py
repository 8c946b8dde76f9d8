"""Sizes of a capsule layer enter; time and memory of every engine beside the dense form leave.

All forms run in one process, one after the other in every round, so that whatever else the
machine does meets them alike. Each is compared with the dense form in float64 first; one that is
wrong is not timed. Memory is measured in a process of its own for each form.

    python scripts/bench_routing.py --output benchmarks/routing-cpu.json
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn import Parameter

import graphcaps as gc
from graphcaps._dgl import dgl
from graphcaps.passing import ENGINES

FORMS = ("dense", "fused", *ENGINES)
MODES = ("forward", "forward+backward")
ALLOWED_ERROR = 1e-4  # relative to the largest value; float32 has 1e-7 for one operation


@dataclass(frozen=True)
class Layer:
    """A capsule layer on a complete graph, votes and routing."""

    batch: int = 64
    children: int = 1152
    parents: int = 10
    child_dim: int = 8
    parent_dim: int = 16
    iterations: int = 3


@dataclass(frozen=True)
class Options:
    """Compare the engines of graphcaps with dense routing."""

    layer: Layer = Layer()
    threads: int = 2
    """Of torch and of DGL."""
    rounds: int = 15
    """How often each form is timed."""
    output: Path | None = None
    """A JSON file for all figures."""
    memory_of: str | None = None
    """Print the peak memory of FORM:MODE alone; used by this script itself."""


def make_form(form: str, layer: Layer, weight: Parameter) -> Callable[[Tensor], Tensor]:
    """The layer as a function of poses `[B, I, K]`, which gives `[B, J, D]`."""
    if form == "dense":
        matrices = weight.unflatten(0, (layer.children, layer.parents))

        def dense(u: Tensor) -> Tensor:
            votes = gc.reference.votes(u, matrices)
            return gc.reference.dynamic_routing(votes, layer.iterations)[0]

        return dense
    graph = gc.complete_graph(layer.children, layer.parents)
    capsules = gc.CapsuleLayer(
        graph,
        layer.child_dim,
        layer.parent_dim,
        iterations=layer.iterations,
        engine=form,
        dtype=weight.dtype,
    )
    capsules.weight = weight
    return capsules


def make_input(layer: Layer, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Parameter]:
    """Squashed poses and the matrices, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    poses = torch.randn(layer.batch, layer.children, layer.child_dim, generator=generator)
    weight = torch.randn(
        layer.children * layer.parents, layer.child_dim, layer.parent_dim, generator=generator
    )
    return gc.squash(poses).to(dtype).requires_grad_(), Parameter((0.1 * weight).to(dtype))


def run(function: Callable[[Tensor], Tensor], u: Tensor, weight: Parameter, mode: str) -> Tensor:
    """One forward, without gradients, or one forward and backward."""
    if mode == "forward":
        with torch.no_grad():
            return function(u)
    u.grad = weight.grad = None
    v = function(u)
    v.square().sum().backward()
    return v


def seconds(function: Callable[[Tensor], Tensor], u: Tensor, weight: Parameter, mode: str) -> float:
    """Wall-clock time of one `run`."""
    started = time.perf_counter()
    run(function, u, weight, mode)
    return time.perf_counter() - started


def gradients(form: str, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    """Output and both gradients of one form."""
    u, weight = make_input(layer, dtype)
    v = run(make_form(form, layer, weight), u, weight, "forward+backward")
    assert u.grad is not None and weight.grad is not None
    return [v.detach(), u.grad, weight.grad]


def relative_error(form: str, layer: Layer, truth: list[Tensor]) -> float:
    """The largest error of output and gradients, relative to the largest value of each."""
    found = gradients(form, layer, torch.float32)
    return max(
        float((x - right).abs().max() / right.abs().max())
        for x, right in zip(found, truth, strict=True)
    )


def peak_memory(form: str, mode: str, layer: Layer) -> float:
    """MiB that one run needs beyond what is there before it; Linux alone can tell."""
    u, weight = make_input(layer)
    function = make_form(form, layer, weight)
    # libraries load, pools fill; what is compiled is compiled for the batch
    first = u if form == "fused" else u[:1]
    run(function, first.detach().requires_grad_(), weight, mode)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run(function, u, weight, mode)
    return (_status("VmHWM") - before) / 1024


def measure(options: Options) -> dict:
    """Every form in every mode: seconds of each round, MiB, error; and the cost of the graph."""
    layer = options.layer
    truth = gradients("dense", layer, torch.float64)
    errors = {form: relative_error(form, layer, truth) for form in FORMS}
    right = [form for form in FORMS if errors[form] <= ALLOWED_ERROR]
    u, weight = make_input(layer)
    functions = {form: make_form(form, layer, weight) for form in right}
    first = {form: seconds(function, u, weight, "forward") for form, function in functions.items()}
    times: dict[str, dict[str, list[float]]] = {f: {m: [] for m in MODES} for f in right}
    for function in functions.values():
        run(function, u, weight, "forward+backward")
    for _ in range(options.rounds):
        for mode in MODES:
            for form, function in functions.items():
                times[form][mode].append(seconds(function, u, weight, mode))
    return {
        "layer": asdict(layer),
        "machine": {
            "processor": _processor(),
            "threads": options.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "dgl": dgl.__version__,
        },
        "relative_error": errors,
        "first_forward_seconds": first,
        "seconds": times,
        "peak_mib": {f: {m: _measured_apart(f, m, options) for m in MODES} for f in right},
    }


def table(results: dict) -> str:
    """The figures as Markdown: medians, quartiles, and ratios to the dense form."""
    lines = [
        "| form | forward | × dense | forward + backward | × dense "
        "| peak memory, forward | forward + backward |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = results["seconds"]["dense"]
    for form, times in results["seconds"].items():
        cells = [form]
        for mode in MODES:
            low, middle, high = (1e3 * q for q in statistics.quantiles(times[mode], n=4))
            ratio = statistics.median(times[mode]) / statistics.median(dense[mode])
            cells += [f"{middle:.0f} ms ({low:.0f} to {high:.0f})", f"{ratio:.2f}"]
        cells += [f"{results['peak_mib'][form][mode]:.0f} MiB" for mode in MODES]
        lines.append(f"| {' | '.join(cells)} |")
    wrong = set(FORMS) - set(results["seconds"])
    lines += [f"{form}: wrong, error {results['relative_error'][form]:.1e}" for form in wrong]
    return "\n".join(lines)


def _measured_apart(form: str, mode: str, options: Options) -> float:
    sizes = [f"--layer.{name.replace('_', '-')}={n}" for name, n in asdict(options.layer).items()]
    command = [sys.executable, __file__, *sizes, f"--threads={options.threads}"]
    done = subprocess.run(
        [*command, f"--memory-of={form}:{mode}"],
        check=True,
        capture_output=True,
        text=True,
        # every large block is then given back when it is freed, and counts only while in use
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return float(done.stdout)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        form, mode = options.memory_of.split(":")
        print(peak_memory(form, mode, options.layer))
        return
    results = measure(options)
    layer, machine = results["layer"], results["machine"]
    print(
        f"{layer['children']} → {layer['parents']} capsules, {layer['child_dim']} → "
        f"{layer['parent_dim']}, {layer['iterations']} iterations, batch {layer['batch']}; "
        f"{machine['threads']} threads, {machine['processor']}, torch {machine['torch']}, "
        f"DGL {machine['dgl']}; median of {options.rounds} rounds and quartiles\n"
    )
    print(table(results))
    for form, first in results["first_forward_seconds"].items():
        later = statistics.median(results["seconds"][form]["forward"])
        print(f"{form}: first forward {1e3 * first:.0f} ms, later ones {1e3 * later:.0f} ms")
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
