"""Runs that are killed at any write, whose output streams fail, or whose files are damaged."""

import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from run_records import STARTED, result, step_metrics
from starts import THOROUGH, Starts

import graphcaps as gc
from graphcaps.training.checkpoints import RunFolder, check_alike

DIGITS = Path(__file__).parents[1] / "digits"


@pytest.fixture(scope="module")
def start():
    with Starts() as starts:
        yield starts


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """A data set of 24 images to train on, 2 held out and 10 to test."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    folder.mkdir()
    for part, count in (("train", 26), ("t10k", 10)):
        for name, size, header in (("images-idx3-ubyte", 784, 16), ("labels-idx1-ubyte", 1, 8)):
            content = gzip.decompress((DIGITS / f"{part}-{name}.gz").read_bytes())
            (folder / f"{part}-{name}").write_bytes(
                content[:4] + count.to_bytes(4, "big") + content[8 : header + size * count]
            )
    return folder


@pytest.fixture(scope="module")
def train(few_digits):
    """The command of a training of two epochs of two steps, with a checkpoint after each."""
    flags = {"dataset": few_digits, "epochs": 2, "batch-size": 12, "checkpoint-every": 1}
    flags |= {"device": "cpu", "engine": "scatter"}
    return ["train", *(str(part) for name in flags for part in (f"--{name}", flags[name]))]


@pytest.fixture(scope="module")
def unbroken(start, train, tmp_path_factory):
    """The outcome of an undisturbed run, and the number of its calls that write."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    status, calls = start(*train, "--run-dir", run)
    assert status == 0
    assert calls > 100
    return outcome(run), calls


def outcome(run):
    """The files and results of a run that must not depend on interruptions."""
    files = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}
    exact = {name: path.read_bytes() for name, path in files.items() if "model." in name}
    metrics = [replaced(line, "seconds") for line in files["metrics.jsonl"].open()]
    found = replaced(files["result.json"].read_text(), "seconds", "run")
    return sorted(files), exact, metrics, found


def replaced(line, *names):
    return json.loads(line) | dict.fromkeys(names)


def go_on(start, train, run, **how):
    """Continue as a user would: resume the run if it exists, otherwise start again."""
    command = ["train", "--resume"] if (run / "settings.json").exists() else train
    return start(*command, "--run-dir", run, **how)


def test_a_run_killed_at_any_call_that_writes_goes_on_to_the_same_bits(
    start, train, unbroken, tmp_path
):
    expected, calls = unbroken
    moments = random.Random(0)
    for at in range(1, calls + 1, 1 if THOROUGH else 9):
        run = tmp_path / f"run{at}"
        assert start(*train, "--run-dir", run, at=at) == [-signal.SIGKILL, 0], at
        if THOROUGH:
            go_on(start, train, run, at=moments.randrange(1, calls))
        told = tmp_path / "told"
        assert go_on(start, train, run, stderr=told)[0] == 0, (at, told.read_text())
        assert outcome(run) == expected, at
        shutil.rmtree(run)


STREAMS = {"full disk": "/dev/full", "broken pipe": "broken pipe", "closed": None}


@pytest.mark.parametrize(
    ("stdout", "stderr"), [(o, e) for o in STREAMS for e in STREAMS if THOROUGH or o == e]
)
def test_a_run_that_nobody_hears_comes_to_the_same_bits(
    start, train, unbroken, tmp_path, stdout, stderr
):
    start(*train, "--run-dir", tmp_path / "run", stdout=STREAMS[stdout], stderr=STREAMS[stderr])
    assert outcome(tmp_path / "run") == unbroken[0]


@pytest.mark.parametrize("encoding", ["ascii", "koi8-r"])
def test_a_run_told_in_any_encoding_comes_to_the_same_bits(
    start, train, unbroken, tmp_path, few_digits, encoding
):
    folder = Path(shutil.copytree(few_digits, tmp_path / "Ziffern – 数字"))
    run, told = tmp_path / "run", tmp_path / "told"
    flags = ["--run-dir", run, "--dataset", folder]
    assert start(*train, *flags, stdout=told, stderr=told, encoding=encoding)[0] == 0
    files, exact, metrics, _ = outcome(run)
    assert (files, exact, metrics) == unbroken[0][:3]
    assert "Test accuracy" in told.read_text(encoding)


SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"]


@pytest.mark.parametrize(
    ("stream", "name"),
    [(s, n) for s in STREAMS for n in SIGNALS if THOROUGH or n == "SIGINT" or s == "broken pipe"],
)
def test_a_signal_while_nobody_hears_saves(start, train, unbroken, tmp_path, stream, name):
    expected, calls = unbroken
    run, dead = RunFolder(tmp_path / "run"), STREAMS[stream]
    how = dict(at=calls // 2, number=signal.Signals[name], stdout=dead, stderr=dead)
    status, _ = start(*train, "--run-dir", run.path, **how)
    assert status > 0
    assert run.result() is None
    (step,) = {json.loads(line)["step"] for line in (run.path / "metrics.jsonl").open()} or {0}
    assert int(run.last_checkpoint().name.split("-")[1]) >= max(step, 1)
    assert go_on(start, train, run.path)[0] == 0
    assert outcome(run.path) == expected


def test_the_program_trains_to_the_end_when_the_reader_of_its_pipe_leaves(train, tmp_path):
    run = tmp_path / "run"
    program = [sys.executable, "-m", "graphcaps", *train, "--run-dir", str(run)]
    shell = ["bash", "-c", '"$@" 2>&1 | head -n 1', "bash", *program]
    done = subprocess.run(shell, check=True, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert RunFolder(run).result()["epochs"] == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with one file of each kind."""
    run = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    run.path.mkdir()
    run.create(STARTED)
    for step in (1, 2, 3):
        run.log(step_metrics(step))
    run.finish(replace(result(errors=3), run=str(run.path)))
    model = gc.CapsNet.from_preset("small", conv_channels=2, capsule_maps=1, decoder_hidden=None)
    run.save_checkpoint(1, model, training(model))
    return run, model


def training(model):
    optimizer = torch.optim.Adam(model.parameters())
    return {"step": 1, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}


@st.composite
def damages(draw):
    """Changes of a file's bytes, or truncations."""
    kind = draw(st.sampled_from(["flip", "overwrite", "insert", "cut", "repeat"]))
    where, garbage = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=9))

    def damage(content):
        at = int(where * max(len(content) - 1, 0))
        match kind:
            case "flip" if content:
                return content[:at] + bytes([content[at] ^ 1 << garbage[0] % 8]) + content[at + 1 :]
            case "overwrite":
                return content[:at] + garbage + content[at + len(garbage) :]
            case "insert":
                return content[:at] + garbage + content[at:]
            case "cut":
                return content[:at]
        return content + content[at:]

    return damage


JSON_FILES = {
    "settings.json": RunFolder.settings,
    "result.json": RunFolder.result,
    "metrics.jsonl": RunFolder.metrics,
}
MANY = settings(
    max_examples=2000 if THOROUGH else 60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("name", JSON_FILES)
@MANY
@given(st.lists(damages(), min_size=1, max_size=3))
def test_a_damaged_record_is_read_or_refused_by_its_name(name, whole, some):
    run, _ = whole
    file = run.path / name
    content = file.read_bytes()
    damaged = content
    for damage in some:
        damaged = damage(damaged)
    file.write_bytes(damaged)
    try:
        JSON_FILES[name](run)
    except ValueError as error:
        assert name != "metrics.jsonl"
        assert str(error).startswith(str(file)) and str(error).isprintable()  # noqa: PT017
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("checked", [True, False], ids=["with checksums", "without"])
@MANY
@given(st.data())
def test_a_damaged_checkpoint_is_refused_by_its_name_or_of_the_right_form(checked, whole, data):
    run, model = whole
    checkpoint = run.last_checkpoint()
    names = ["training.pt", "model.safetensors"]
    file = checkpoint / data.draw(st.sampled_from(names))
    sums = checkpoint / "SHA256SUMS"
    before = {path: path.read_bytes() for path in (file, sums)}
    damaged = data.draw(damages())(before[file])
    file.write_bytes(damaged)
    if not checked:
        sums.unlink()
    try:
        read = run.load_checkpoint(checkpoint, model)
    except ValueError as error:
        assert str(checkpoint) in str(error)  # noqa: PT017
    else:
        assert not checked or damaged == before[file]
        with suppress(ValueError):
            check_alike(read, training(model), "training")
    finally:
        for path, content in before.items():
            path.write_bytes(content)
