"""Two gloo processes that torchrun starts, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from graphcaps.checkpoints import RunFolder, load_model

DIGITS = Path(__file__).parent / "digits"

ONE_STEP = """
import sys
from pathlib import Path
import torch
from graphcaps.checkpoints import RunFolder
from graphcaps.data import load_dataset
from graphcaps.settings import TrainSettings, make_recipe
from graphcaps.training import Trainer
from graphcaps.workers import joined_workers

run, digits = sys.argv[1:]
settings = TrainSettings(dataset=digits, batch_size=48)
data = load_dataset(digits)
with joined_workers("cpu") as workers:
    recipe = make_recipe(settings, "small", len(data.train.labels))
    trainer = Trainer(settings, recipe, data, workers, RunFolder(Path(run)))
    order, shifts = trainer._plan(0)
    loss, correct, _ = trainer._take_step(order[:48], shifts[:48])
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    torch.save(
        {"loss": loss, "correct": correct, "gradients": gradients, "size": workers.size},
        f"{run}-{workers.rank}.pt",
    )
"""


def processes(count, *command):
    launcher = [sys.executable]
    if count > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [*launcher, *map(str, command)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_gradients_of_two_processes_equal_those_of_one(tmp_path):
    script = tmp_path / "one_step.py"
    script.write_text(ONE_STEP)
    processes(1, script, tmp_path / "one", DIGITS)
    processes(2, script, tmp_path / "two", DIGITS)
    one = torch.load(tmp_path / "one-0.pt", weights_only=True)
    first, second = (torch.load(tmp_path / f"two-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert (one["size"], first["size"], second["size"]) == (1, 2, 2)
    for name, expected in one["gradients"].items():
        for got in (first, second):
            scale = float(expected.abs().max())
            assert_close(got["gradients"][name], expected, rtol=1e-4, atol=1e-5 * scale)
    for got in (first, second):
        assert got["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert got["correct"] == one["correct"]


def test_two_processes_train_one_run_as_one_process_does(tmp_path):
    flags = ["--dataset", DIGITS, "--epochs", 1, "--batch-size", 48, "--device", "cpu"]
    for count, name in ((1, "one"), (2, "two")):
        run = tmp_path / name
        launched = ["graphcaps", "train", "--run-dir", run, *flags]
        done = processes(count, "-m", *launched)
        assert done.stdout.count("The run's files are in") == 1
    logs = [RunFolder(tmp_path / name).metrics() for name in ("one", "two")]
    assert [r["kind"] for r in logs[0]] == [r["kind"] for r in logs[1]]
    assert logs[1][-1]["train_loss"] == pytest.approx(logs[0][-1]["train_loss"], rel=1e-3)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["test_images"] == results[1]["test_images"] == 100
    load_model(tmp_path / "two" / "best")
