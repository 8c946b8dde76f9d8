"""A net's preset enters; how long its training step takes, with and without routing, leaves.

Without routing, the class capsules are what the same matrices give with equal coupling, as one
matrix product: the least that a layer of this size can cost. Steps alternate in one process:
forward, loss, backward, Adam.

    python scripts/bench_training.py --output benchmarks/training-cpu.json
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from measuring import alternating, machine, quartiles, write
from torch import Tensor, nn

import graphcaps as gc

FORMS = ("without routing", "dense", "udf", "builtin", "scatter", "fused")


@dataclass(frozen=True)
class Options:
    """Time training steps of a preset with every form of routing, and without any."""

    preset: Literal["paper", "small"] = "paper"
    batch: int = 64
    threads: int = 2
    """Of torch and of DGL."""
    device: str = "cpu"
    """cpu or cuda."""
    rounds: int = 7
    """How often each form is timed."""
    forms: tuple[str, ...] = FORMS
    output: Path | None = None
    """A JSON file for all figures."""


class Unrouted(nn.Module):
    """A layer's matrices with equal coupling, as one matrix product."""

    def __init__(self, layer: gc.CapsuleLayer) -> None:
        super().__init__()
        self.weight, self.parents = layer.weight, layer.graph.num_nodes("parent")

    def forward(self, u: Tensor) -> Tensor:
        """Poses `[B, I, K]` to `[B, J, D]`."""
        matrices = self.weight.unflatten(0, (-1, self.parents)).transpose(1, 2).flatten(0, 1)
        s = u.flatten(1) @ matrices.flatten(1) / self.parents
        return gc.squash(s.unflatten(1, (self.parents, -1)))


class Dense(nn.Module):
    """A layer's matrices with dynamic routing in dense tensors."""

    def __init__(self, layer: gc.CapsuleLayer) -> None:
        super().__init__()
        self.weight, self.iterations = layer.weight, layer.iterations

    def forward(self, u: Tensor) -> Tensor:
        """Poses `[B, I, K]` to `[B, J, D]`."""
        votes = gc.reference.votes(u, self.weight.unflatten(0, (u.shape[1], -1)))
        return gc.reference.dynamic_routing(votes, self.iterations)[0]


INSTEAD = {"without routing": Unrouted, "dense": Dense}


def make_step(form: str, options: Options) -> Callable[[], None]:
    """One training step on random images, always the same ones."""
    torch.manual_seed(0)
    model = gc.CapsNet.from_preset(options.preset, engine="auto" if form in INSTEAD else form)
    if form in INSTEAD:
        model.add_module("capsules", INSTEAD[form](model.capsules))
    model.to(options.device)
    optimizer = torch.optim.Adam(model.parameters())
    images = torch.rand(options.batch, 1, 28, 28, device=options.device)
    labels = torch.randint(10, (options.batch,), device=options.device)

    def step() -> None:
        optimizer.zero_grad()
        gc.capsnet_loss(model(images, labels), images, labels).backward()
        optimizer.step()

    return step


def table(results: dict) -> str:
    """Medians and quartiles, and the ratio to the step without routing."""
    lines = ["| routing | training step | × without routing |", "|---|---|---|"]
    least = quartiles(results["seconds"]["without routing"])[1]
    for form, seconds in results["seconds"].items():
        low, middle, high = quartiles(seconds)
        cells = f"{1e3 * middle:.0f} ms ({1e3 * low:.0f} to {1e3 * high:.0f})"
        lines.append(f"| {form} | {cells} | {middle / least:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write the JSON."""
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    steps = {form: make_step(form, options) for form in options.forms}
    results = {
        "preset": options.preset,
        "batch": options.batch,
        "machine": machine(options.threads),
        "seconds": alternating(steps, options.rounds),
    }
    print(table(results))
    if options.output is not None:
        write(options.output, results)


if __name__ == "__main__":
    main()
