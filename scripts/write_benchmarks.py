"""Write the READMEs' tables and a figure from the JSON files of the benchmarks.

    python scripts/write_benchmarks.py

The results are written between the lines `<!-- NAME -->` and `<!-- /NAME -->` of README.md and
benchmarks/README.md.
"""

import itertools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_routing
import bench_training
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from measuring import quartiles

from graphcaps.compare import Cell, Place, given_for, read_cells, read_comparison

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
FILES = (ROOT / "README.md", BENCHMARKS / "README.md")
LONGER = ("presets", "fashion-mnist", "multi-mnist")  # tables of graphcaps compare
NAMES = {
    "batch": "batch",
    "children": "children",
    "iterations": "iterations",
    "kept": "share of edges kept",
}
STYLES = {
    "dense": ("s:", "#9a9a9a"),
    "compiled": ("D-.", "#b2410e"),
    "builtin": ("^--", "#4292c6"),
    "fused": ("o-", "#08306b"),
}


def main() -> None:
    """Write the tables and the figure."""
    for file in FILES:
        file.write_text(with_tables(file.read_text()))
    draw_sweeps(_read("routing-cpu")).savefig(BENCHMARKS / "routing-cpu.png", dpi=100)


def with_tables(text: str) -> str:
    """Fill the results into the text of a README."""
    routing, training = _read("routing-cpu"), _read("training-cpu")
    contents = {
        "claim": _claim(routing),
        "routing-cpu": f"{_machine(routing)}\n\n{bench_routing.table(routing)}",
        "large-cpu": _large(routing),
        "kept-cpu": _kept(routing),
        "routings-cpu": bench_routing.table_of_routings(routing),
        "conv-cpu": _large_without_votes(routing),
        "choices-cpu": _choices(_read("choices-cpu")),
        "training-cpu": f"{_machine(training)}\n\n{bench_training.table(training)}",
        "cuda": _on_a_gpu(),
        "results-routings": _compared(ROOT / "results" / "routings.toml"),
        "results-longer": _trained_longer(),
    }
    places = re.findall(r"^<!-- ([a-z-]+) -->$", text, flags=re.MULTILINE)
    for name in places:
        if name not in contents:
            raise SystemExit(f"there are no results for {name}; choose one of {[*contents]}")
        start, stop = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if stop not in text:
            raise SystemExit(f"{start.strip()} has no end: add {stop}")
        before, rest = text.split(start)
        text = f"{before}{start}{contents[name]}\n{stop}{rest.split(stop)[1]}"
    return text


def draw_sweeps(results: dict[str, Any]) -> Figure:
    """Plot the time of forward and backward by batch, children, iterations and share of edges."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(results["sweeps"]), sharey=True)
    for axes, (name, cases) in zip(panels, results["sweeps"].items(), strict=True):
        at = [case["layer"][name] for case in cases]
        forms = {f: x for f, x in STYLES.items() if f in cases[0]["seconds"]["forward+backward"]}
        for form, (style, color) in forms.items():
            times = [1e3 * quartiles(c["seconds"]["forward+backward"][form])[1] for c in cases]
            axes.plot(at, times, style, color=color, markeredgecolor="#222222", markersize=4)
            if axes is panels[-1]:
                place = dict(xytext=(6, 0), textcoords="offset points", va="center")
                axes.annotate(form, (max(at), times[at.index(max(at))]), color=color, **place)
        axes.set(xlabel=NAMES[name], xscale="log", yscale="log")
        axes.set_xticks(at, [f"{x:g}" for x in at], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", color="#e5e5e5")
    panels[0].set_ylabel("forward + backward (ms)")
    return figure


def _claim(results: dict[str, Any]) -> str:
    def speedup(case: dict[str, Any], form: str) -> str:
        medians = {f: quartiles(x)[1] for f, x in case["seconds"]["forward+backward"].items()}
        return f"{medians[form] / medians['fused']:.2g}"

    em = next(case for case in results["routings"] if case["layer"]["routing"] == "em")
    return (
        "- **Fast, with little memory.** On two CPU cores, forward and backward of a layer of "
        f"1152 → 10 capsules with dynamic routing are {speedup(results, 'dense')} times as fast as "
        f"dense PyTorch code, and {speedup(results, 'compiled')} times as fast as the same code "
        f"under `torch.compile`; with EM routing, {speedup(em, 'dense')} times as fast as dense "
        "code. Votes are recomputed instead of stored, so the memory for activations does not grow "
        "with the number of edges ([benchmarks](#benchmarks))."
    )


def _large(results: dict[str, Any]) -> str:
    large = results["large"]
    layer = large["layer"]
    votes = layer["batch"] * layer["children"] * layer["parents"] * layer["parent_dim"] * 4
    seconds = quartiles(large["seconds"]["forward+backward"]["fused"])[1]
    return (
        f"{bench_routing.describe(layer)}, whose votes alone are {votes / 1e9:.1f} GB: forward and "
        f"backward with `fused` take {seconds:.1f} s and "
        f"{large['peak_mib']['forward+backward']:.0f} MiB beyond inputs, output and gradients."
    )


def _large_without_votes(results: dict[str, Any]) -> str:
    sentences = []
    for name in ("conv", "wide_conv", "wide_conv_em"):
        case = results[name]
        layer = case["layer"]
        sizes = [round((layer[nodes] / 32) ** 0.5) for nodes in ("children", "parents")]
        votes = layer["batch"] * layer["parents"] * 9 * 32 * layer["parent_dim"] * 4
        seconds = quartiles(case["seconds"]["forward+backward"]["fused"])[1]
        maps = " → ".join(f"{size}×{size}×32" for size in sizes)
        sentences.append(
            f"- {maps} capsules with {layer['rows']}×{layer['rows']} poses, {layer['routing']} "
            f"routing, batch {layer['batch']}, whose votes would take {votes / 1e9:.1f} GB: "
            f"{seconds:.1f} s and {case['peak_mib']['forward+backward']:.0f} MiB."
        )
    return "\n".join(
        [
            "Convolutional layers with 3×3 windows and stride 2, forward and backward with "
            "`fused`; memory is beyond inputs and gradients:",
            "",
            *sentences,
        ]
    )


def _kept(results: dict[str, Any]) -> str:
    cost = {float(share): quartiles(x)[1] for share, x in results["kept"].items()}
    parts = [f"{share:.0%} of the edges: {x / cost[1.0]:.2f}" for share, x in cost.items()]
    return (
        "Time of `fused`, forward and backward, on pruned graphs, relative to the complete graph. "
        f"{'; '.join(parts)}."
    )


def _compared(table: Path) -> str:
    """Test accuracies of a table of `graphcaps compare`: rows by data sets."""
    comparison, cells = read_comparison(table), read_cells(table)
    lines = [f"| test accuracy, % (seeds so far) | {' | '.join(comparison.datasets)} |"]
    lines.append("|---|" + "---|" * len(comparison.datasets))
    for row in comparison.rows:
        of_row = [cell for cell in cells if cell.row == row]
        texts = [
            _accuracy([cell for cell in of_row if cell.dataset == dataset], len(comparison.seeds))
            for dataset in comparison.datasets
        ]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _trained_longer() -> str:
    """The nets of the other tables of `graphcaps compare`, one in each line."""
    lines = ["| data set | net | parameters | epochs | test accuracy, % (seeds so far) |"]
    lines.append("|---|---|---|---|---|")
    for name in LONGER:
        table = ROOT / "results" / f"{name}.toml"
        comparison, cells = read_comparison(table), read_cells(table)
        for dataset, row in itertools.product(comparison.datasets, comparison.rows):
            found = [cell for cell in cells if (cell.row, cell.dataset) == (row, dataset)]
            size = f"{found[0].parameters:,}" if found else ""
            epochs = given_for(comparison, Place(row, dataset, 0))["epochs"]
            accuracy = _accuracy(found, len(comparison.seeds)) or "not measured"
            lines.append(f"| {dataset} | {row} | {size} | {epochs} | {accuracy} |")
    return "\n".join(lines)


def _accuracy(cells: Sequence[Cell], seeds: int) -> str:
    """Mean ± standard deviation of test accuracies, and the number of seeds if some are missing."""
    found = [100 * cell.test_accuracy for cell in cells if cell.test_accuracy is not None]
    text = f"{statistics.mean(found):.2f}" if found else ""
    if len(found) > 1:
        text += f" ± {statistics.stdev(found):.2f}"
    if found and len(found) < seeds:
        text += f" ({len(found)} of {seeds})"
    return text


def _choices(results: dict[str, Any]) -> str:
    """Forward and backward of `auto` beside each form; medians."""
    forms = {
        "auto": "`auto`",
        "samples": "`fused`, samples in lanes",
        "poses": "`fused`, poses in lanes",
        "builtin": "`builtin`",
        "dense": "dense",
        "padded": "dense, padded",
        "anew": "`auto`, prepared anew",
    }
    lines = [_machine(results), "", f"| ms | {' | '.join(forms.values())} |"]
    lines.append("|---|" + "---|" * len(forms))
    for name, seconds in results["choices"].items():
        times = [f"{1e3 * quartiles(seconds[f])[1]:.1f}" if f in seconds else "" for f in forms]
        lines.append(f"| {name} | {' | '.join(times)} |")
    lines.append("")
    for name, peaks in results["peak_mib"].items():
        lines.append(
            f"- Memory of {name}, beyond inputs and gradients: {peaks['auto']:.1f} MiB by `auto`, "
            f"{peaks['padded']:.1f} MiB padded."
        )
    return "\n".join(lines)


def _on_a_gpu() -> str:
    """A table of aims and results on a GPU; if a file is missing, its result was not measured."""
    found, memory = {}, "not measured"
    for batch in (128, 512):
        layer = _read_if_measured(f"routing-cuda-{batch}")
        found[batch] = "not measured"
        if layer is not None:
            medians = {f: quartiles(x)[1] for f, x in layer["seconds"]["forward+backward"].items()}
            ratios = [
                f"{medians['fused'] / medians[form]:.2f} of {form}"
                for form in ("dense", "compiled")
                if form in medians
            ]
            found[batch] = f"{', '.join(ratios)} ({layer['machine']['gpu']})"
            peaks = {f: x["forward+backward"] for f, x in layer["peak_mib"].items()}
            memory = f"{peaks['fused'] / peaks['dense']:.2f} of dense (batch {batch})"
    run = _read_if_measured("train-cuda")
    epoch = accuracy = "not measured"
    if run is not None:
        epoch = f"{run['seconds'] / run['epochs']:.1f} s, with validation and files"
        accuracy = f"{run['test_accuracy']:.2%} in {run['seconds']:.0f} s"
    rows = [
        ("the layer, forward + backward, batch 128", "0.20 of dense, 0.50 of compiled", found[128]),
        ("the same, batch 512", "0.20 of dense, 0.50 of compiled", found[512]),
        ("its peak memory", "0.10 of dense", memory),
        ("an epoch of the paper's net", "2 s", epoch),
        ("MNIST to 99.6 %", "60 s", accuracy),
    ]
    lines = ["| what | aim | measured |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"DGL {machine['dgl']}, Python {machine['python']}:"
    )


def _read(name: str) -> dict[str, Any]:
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


def _read_if_measured(name: str) -> dict[str, Any] | None:
    return _read(name) if (BENCHMARKS / f"{name}.json").exists() else None


if __name__ == "__main__":
    main()
