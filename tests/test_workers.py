"""Two gloo processes that torchrun starts, against one process."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from graphcaps.nets.model import CapsNet
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.workers import Workers

DIGITS = Path(__file__).parent / "digits"

ONE_STEP = """
import sys
from pathlib import Path
import torch
from graphcaps.training.checkpoints import RunFolder
from graphcaps.data.datasets import load_dataset
from graphcaps.training.settings import TrainSettings, make_recipe
from graphcaps.training.loop import Trainer
from graphcaps.training.workers import joined_workers

run, digits = sys.argv[1:]
settings = TrainSettings(dataset=digits, batch_size=48)
data = load_dataset(digits)
with joined_workers("cpu") as workers:
    recipe = make_recipe(settings, "small", len(data.train.labels))
    trainer = Trainer(settings, recipe, data, workers, RunFolder(Path(run)))
    order, shifts = trainer._plan(0)
    trainer._take_step(order[:48], shifts[:48])
    loss, correct = trainer._last_seen
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    torch.save(
        {"loss": loss, "correct": correct, "gradients": gradients, "size": workers.size},
        f"{run}-{workers.rank}.pt",
    )
"""


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def launcher(count):
    if count == 1:
        return [sys.executable]
    flags = ["--standalone", f"--nproc-per-node={count}"]
    return [sys.executable, "-m", "torch.distributed.run", *flags]


def processes(count, *command, fails=False):
    done = subprocess.run(
        [*launcher(count), *map(str, command)],
        check=False,
        capture_output=True,
        text=True,
        env=ONE_THREAD,
        timeout=200,
    )
    assert (done.returncode != 0) == fails, done.stderr
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


SHARDED_AND_REPLICATED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
import graphcaps as gc

def gradients(wrap, rank, size):
    torch.manual_seed(0)
    sizes = dict(conv_channels=4, capsule_maps=2, decoder_hidden=(8,))
    model = gc.CapsNet.from_preset("small", engine="fused", **sizes)
    images, labels = torch.rand(16, 1, 28, 28), torch.arange(16) % 10
    share = slice(rank * 16 // size, (rank + 1) * 16 // size)
    wrapped = wrap(model)  # which averages gradients as long as it lives
    output = wrapped(images[share], labels[share])
    gc.capsnet_loss(output, images[share], labels[share]).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in found.items()}

def fsdp(model):
    fully_shard(model.capsules)
    return fully_shard(model)

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.save(
    {
        "alone": gradients(lambda model: model, 0, 1),
        "ddp": gradients(DistributedDataParallel, rank, size),
        "fsdp": gradients(fsdp, rank, size),
    },
    f"{sys.argv[1]}-{rank}.pt",
)
dist.destroy_process_group()
"""


def test_ddp_and_fsdp_give_the_gradients_of_one_process(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED_AND_REPLICATED)
    processes(2, script, tmp_path / "gradients")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"gradients-{rank}.pt", weights_only=True)
        for name, expected in found["alone"].items():
            scale = float(expected.abs().max())
            for how in ("ddp", "fsdp"):
                assert_close(found[how][name], expected, rtol=1e-4, atol=1e-5 * scale)


def test_sums_are_taken_on_the_device_that_trains(monkeypatch):
    """NCCL takes no tensor of the CPU."""
    summed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: summed.append(x.device.type))
    Workers(rank=0, size=2, device=torch.device("meta")).total(torch.zeros(3))
    assert summed == ["meta"]


def test_every_process_says_what_is_wrong_with_it(tmp_path):
    command = ["-m", "graphcaps", "train", "--run-dir", tmp_path / "run", "--dataset", DIGITS]
    done = processes(2, *command, "--batch-size", 49, "--device", "cpu", fails=True)
    assert "graphcaps[0]: 2 processes share every batch equally" in done.stderr
    assert "graphcaps[1]: 2 processes share every batch equally" in done.stderr


def test_what_the_leader_cannot_enter_is_told_on_every_worker(tmp_path, monkeypatch):
    sent = []

    def broadcast(values):  # to the others, from the leader, which comes first here
        if values == [None]:
            values[0] = pickle.loads(sent[0])
        sent.append(pickle.dumps(values[0]))

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    run = RunFolder(tmp_path / "run")
    with run.locked():
        for rank in (0, 1):
            worker = Workers(rank=rank, size=2, device=torch.device("cpu"))
            with pytest.raises(RuntimeError, match="another process is training in"):
                worker.leader_in(RunFolder(run.path).locked()).__enter__()
    assert len(sent) == 2


TRAIN = [
    *("-m", "graphcaps", "train", "--dataset", DIGITS, "--epochs", 2, "--batch-size", 48),
    *("--device", "cpu", "--run-dir"),
]


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """A run that two processes trained, and what they printed."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "two")
    return run, processes(2, *TRAIN, run.path).stdout


def test_two_interrupted_processes_go_on_as_if_never_stopped(run_of_two, tmp_path):
    unbroken, stopped = run_of_two[0], RunFolder(tmp_path / "stopped")
    train = [*launcher(2), *TRAIN, stopped.path, "--checkpoint-every", 1]
    running = subprocess.Popen(
        list(map(str, train)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ONE_THREAD
    )
    while stopped.last_checkpoint() is None:
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert stopped.result() is None
    processes(2, "-m", "graphcaps", "train", "--run-dir", stopped.path, "--resume")
    for name, tensor in CapsNet.load(unbroken.best).state_dict().items():
        assert_close(CapsNet.load(stopped.best).state_dict()[name], tensor)


def test_two_processes_train_one_run_as_one_process_does(run_of_two, tmp_path):
    two, told_by_two = run_of_two
    one = RunFolder(tmp_path / "one")
    for told in (processes(1, *TRAIN, one.path).stdout, told_by_two):
        assert told.count("The run's files are in") == 1
    logs = [run.metrics() for run in (one, two)]
    assert [r["kind"] for r in logs[0]] == [r["kind"] for r in logs[1]]
    first = [next(r["train_loss"] for r in log if r["kind"] == "epoch") for log in logs]
    assert first[1] == pytest.approx(first[0], rel=1e-3)
    assert one.result()["test_images"] == two.result()["test_images"] == 100
    CapsNet.load(two.best)
