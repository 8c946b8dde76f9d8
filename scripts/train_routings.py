"""Train the small net for one epoch with every routing, and save the results.

    python scripts/train_routings.py --output benchmarks/routings-mnist.json

Existing runs are resumed or reused, so the script can be interrupted at any time.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from measuring import machine, write

import graphcaps as gc
from graphcaps import CapsNet
from graphcaps.training import TrainSettings, train


@dataclass(frozen=True)
class Options:
    """Compare the routings on MNIST."""

    epochs: int = 1
    seed: int = 0
    runs: Path = Path("runs/routings")
    """Where each routing has a run's folder."""
    data_dir: Path = Path("data")
    output: Path | None = None
    """A JSON file for what was found."""


def main() -> None:
    """Train, print, write the JSON."""
    options = tyro.cli(Options)
    found: dict[str, Any] = {}
    for routing in gc.ROUTINGS:
        run = options.runs / routing
        if not (run / "result.json").exists():
            train(
                TrainSettings(
                    preset="small",
                    routing=routing,
                    epochs=options.epochs,
                    seed=options.seed,
                    data_dir=options.data_dir,
                    run_dir=run,
                    resume=(run / "settings.json").exists(),
                )
            )
        result = json.loads((run / "result.json").read_text())
        model = CapsNet.load(run / "best")
        found[routing] = {
            "test_errors": result["test_errors"],
            "test_images": result["test_images"],
            "seconds": result["seconds"],
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        print(routing, found[routing])
    if options.output is not None:
        threads = torch.get_num_threads()
        settings = {"epochs": options.epochs, "seed": options.seed, "preset": "small"}
        write(options.output, {"machine": machine(threads), **settings, "routings": found})


if __name__ == "__main__":
    main()
