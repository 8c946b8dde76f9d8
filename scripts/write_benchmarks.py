"""The JSON files of the benchmarks enter; the tables of the README and the picture beside it leave.

    python scripts/write_benchmarks.py

Tables stand between the lines `<!-- NAME -->` and `<!-- /NAME -->` of README.md.
"""

import json
import re
from pathlib import Path
from typing import Any

import bench_routing
import bench_training
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from measuring import quartiles

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
NAMES = {
    "batch": "batch",
    "children": "children",
    "iterations": "iterations",
    "kept": "share of edges kept",
}
STYLES = {"dense": ("s:", "#9a9a9a"), "builtin": ("^--", "#4292c6"), "fused": ("o-", "#08306b")}


def main() -> None:
    """Write both."""
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
    draw_sweeps(_read("routing-cpu")).savefig(BENCHMARKS / "routing-cpu.png", dpi=100)


def with_tables(readme: str) -> str:
    """The README with the figures of the files in their places."""
    routing, training = _read("routing-cpu"), _read("training-cpu")
    for name, content in {
        "routing-cpu": f"{_machine(routing)}\n\n{bench_routing.table(routing)}",
        "large-cpu": _large(routing),
        "kept-cpu": _kept(routing),
        "training-cpu": f"{_machine(training)}\n\n{bench_training.table(training)}",
    }.items():
        readme = _put(readme, name, content)
    return readme


def draw_sweeps(results: dict[str, Any]) -> Figure:
    """Time of forward and backward against batch, children, iterations and share of edges."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(results["sweeps"]), sharey=True)
    for axes, (name, cases) in zip(panels, results["sweeps"].items(), strict=True):
        at = [case["layer"][name] for case in cases]
        for form, (style, color) in STYLES.items():
            times = [1e3 * quartiles(c["seconds"]["forward+backward"][form])[1] for c in cases]
            axes.plot(at, times, style, color=color, markeredgecolor="#222222", label=form)
        axes.set(xlabel=NAMES[name], xscale="log", yscale="log")
        axes.set_xticks(at, [f"{x:g}" for x in at], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", color="#e5e5e5")
    panels[0].set_ylabel("forward + backward (ms)")
    panels[0].legend(frameon=False)
    return figure


def _large(results: dict[str, Any]) -> str:
    large = results["large"]
    layer = large["layer"]
    votes = layer["batch"] * layer["children"] * layer["parents"] * layer["parent_dim"] * 4
    seconds = quartiles(large["seconds"]["forward+backward"]["fused"])[1]
    return (
        f"{bench_routing.describe(layer)}, whose votes alone are {votes / 1e9:.1f} GB: `fused` "
        f"does forward and backward in {seconds:.1f} s and "
        f"{large['peak_mib']['forward+backward']:.0f} MiB beyond inputs, output and gradients."
    )


def _kept(results: dict[str, Any]) -> str:
    cost = {float(share): quartiles(x)[1] for share, x in results["kept"].items()}
    parts = [f"{share:.0%} of the edges: {x / cost[1.0]:.2f}" for share, x in cost.items()]
    return f"Cost of `fused`, forward + backward, on pruned graphs. {'; '.join(parts)}."


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"DGL {machine['dgl']}, Python {machine['python']}:"
    )


def _read(name: str) -> dict[str, Any]:
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


def _put(text: str, name: str, content: str) -> str:
    start, stop = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in text or stop not in text:
        raise SystemExit(f"README.md has no place for {name}: add {start.strip()} and {stop}")
    return re.sub(
        f"({re.escape(start)}).*?({re.escape(stop)})",
        lambda found: f"{found[1]}{content}\n{found[2]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    main()
