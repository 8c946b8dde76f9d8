"""Time one training step of a net with and without routing.

Without routing, the class capsules are what the same matrices give with equal coupling, as one
matrix product: the least that a layer of this size can cost. Loss and gradients of every other form
are first compared with those of dense routing; one that is wrong is not timed. `torch.compile` gets
the dense layer alone in `compiled`, and the whole net, with `fullgraph=True`, in `fused, compiled`.
In bfloat16 are the convolutions and the decoder alone. Steps alternate in one process: forward,
loss, backward, Adam.

    python scripts/bench_training.py --output benchmarks/training-cpu.json
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from measuring import alternating, machine, quartiles, write
from torch import Tensor, nn

import graphcaps as gc
from graphcaps.pictures.inspection import dense_form
from graphcaps.training.capture import Captured

COMPILED = "fused, compiled"
BFLOAT16 = "fused, --amp bf16"
CAPTURED = "fused, --cuda-graph"  # on a GPU alone
WITH_VOTES = ("udf", "builtin", "scatter")
FORMS = ("without routing", "dense", "compiled", *WITH_VOTES, "fused", COMPILED, BFLOAT16)
ENGINES = {
    **dict.fromkeys(("without routing", "dense", "compiled"), "auto"),
    **dict.fromkeys((COMPILED, BFLOAT16, CAPTURED), "fused"),
}
ALLOWED_ERROR = 1e-4
ALLOWED_ERROR_IN_BFLOAT16 = 0.1  # which has 8 bits


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
    output: Path | None = None
    """A JSON file for all figures."""


class Unrouted(nn.Module):
    """A layer's matrices with equal coupling, as one matrix product."""

    def __init__(self, layer: gc.CapsuleLayer) -> None:
        super().__init__()
        self.weight, self.parents = layer.weight, layer.structure.parents

    def forward(self, u: Tensor) -> Tensor:
        """Poses `[B, I, K]` to `[B, J, D]`."""
        matrices = self.weight.unflatten(0, (-1, self.parents)).transpose(1, 2).flatten(0, 1)
        s = u.flatten(1) @ matrices.flatten(1) / self.parents
        return gc.squash(s.unflatten(1, (self.parents, -1)))


class Dense(nn.Module):
    """A layer's matrices with the dense form of its routing."""

    def __init__(self, layer: gc.CapsuleLayer) -> None:
        super().__init__()
        self.layer, self.dense = layer, dense_form(layer)
        self.weight = layer.weight

    def forward(self, u: Tensor) -> Tensor:
        """Poses `[B, I, K]` to `[B, J, D]`."""
        return self.dense(u)[0]


class Training:
    """A net with one form of routing, trained on random images, the same for every form."""

    def __init__(self, form: str, options: Options) -> None:
        torch.manual_seed(0)
        engine = ENGINES.get(form, form)
        self.autocast = torch.autocast(options.device, torch.bfloat16, enabled=form == BFLOAT16)
        self.model = gc.CapsNet.from_preset(options.preset, engine=engine)
        if form == "without routing":
            self.model.add_module("capsules", Unrouted(self.model.capsules))
        elif form in ("dense", "compiled"):
            dense = Dense(self.model.capsules)
            if form == "compiled":
                dense.compile()
            self.model.add_module("capsules", dense)
        elif form == COMPILED:
            self.model.compile(fullgraph=True)
        self.model.to(options.device).to(memory_format=torch.channels_last)  # as graphcaps train
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        images = torch.rand(options.batch, 1, 28, 28, device=options.device)
        labels = torch.randint(10, (options.batch,), device=options.device)
        self.batch = images, labels
        self.compute: Callable[..., Sequence[Tensor]] = self._loss_and_gradients
        if form == CAPTURED:
            self.compute = Captured(self._loss_and_gradients, self.batch)

    def step(self) -> None:
        """Forward, loss, backward, Adam."""
        self.compute(*self.batch)
        self.optimizer.step()

    def _loss_and_gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        self.optimizer.zero_grad()
        with self.autocast:
            output = self.model(images, labels)
        loss = gc.capsnet_loss(output, images, labels)
        loss.backward()
        return [loss.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)]


def errors(trainings: dict[str, Training]) -> dict[str, float]:
    """The largest error of loss and gradients, as norms, each relative to that of what is right."""
    truth = [x.clone() for x in trainings["dense"].compute(*trainings["dense"].batch)]
    return {
        form: max(
            float((x - right).norm() / right.norm())
            for x, right in zip(training.compute(*training.batch), truth, strict=True)
        )
        for form, training in trainings.items()
        if form != "without routing"
    }


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
    trainings = {}
    for form in FORMS if options.device == "cpu" else (*FORMS, CAPTURED):
        try:
            training = Training(form, options)
            training.compute(*training.batch)
        except RuntimeError as problem:  # an engine or a compiler that is not there
            print(f"{form} cannot run: {str(problem).splitlines()[0]}")
        else:
            trainings[form] = training
    wrong = errors(trainings)
    allowed = dict.fromkeys(trainings, ALLOWED_ERROR) | {BFLOAT16: ALLOWED_ERROR_IN_BFLOAT16}
    right = {f: t.step for f, t in trainings.items() if wrong.get(f, 0) <= allowed[f]}
    results: dict[str, Any] = {
        "preset": options.preset,
        "batch": options.batch,
        "machine": machine(options.threads),
        "relative_error": wrong,
        "seconds": alternating(right, options.rounds),
    }
    print(table(results))
    if options.output is not None:
        write(options.output, results)


if __name__ == "__main__":
    main()
