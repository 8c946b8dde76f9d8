"""The program as a process: when killed or interrupted, it resumes to identical weights."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from graphcaps.nets.model import CapsNet
from graphcaps.training.checkpoints import RunFolder

DIGITS = Path(__file__).parent / "digits"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(run, *flags):
    command = [sys.executable, "-m", "graphcaps", "train", "--run-dir", str(run), "--device", "cpu"]
    return subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )


def fresh(run):
    recipe = ["--dataset", str(DIGITS), "--epochs", "2", "--batch-size", "49"]
    return start(run, *recipe, "--checkpoint-every", "1")


def steps_saved(run):
    checkpoint = RunFolder(run).last_checkpoint()
    return 0 if checkpoint is None else int(checkpoint.name.split("-")[1])


def wait_for(run, step, process):
    while steps_saved(run) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_a_run_killed_and_interrupted_goes_on_to_the_weights_of_one_that_never_was(tmp_path):
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    process = fresh(unbroken)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "The run's files are in" in out
    moments = random.Random(7)
    process = fresh(run)
    for step in (2, 5):  # of 12, with a checkpoint after each
        wait_for(run, step, process)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert steps_saved(run) >= step
        CapsNet.load(RunFolder(run).last_checkpoint())
        process = start(run, "--resume")
    wait_for(run, 8, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "saved as" in err
    assert f"train --run-dir {run} --resume" in err
    process = start(run, "--resume")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "Test accuracy" in out
    for folder in ("best", "checkpoints/step-00000012"):
        here, there = (r / folder / "model.safetensors" for r in (run, unbroken))
        assert here.read_bytes() == there.read_bytes()
