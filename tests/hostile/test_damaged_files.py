"""Damaged files of every kind: the program exits with one line that names the file.

With GRAPHCAPS_HOSTILE=1 in the environment, many more cases are tried.
"""

import gzip
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from reports import write_run

import graphcaps as gc
from graphcaps import cli, report

EXAMPLES = 1000 if os.environ.get("GRAPHCAPS_HOSTILE") else 40
PATIENCE = 20  # seconds of one command, which takes a twentieth of one
MEMORY = 300_000  # kB more than the program has after it ran once

some = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a run, its data and a picture, and the commands that read them."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    data = folder / "digits"
    data.mkdir()
    for part, count in (("train", 6), ("t10k", 4)):
        pixels = torch.randint(256, (count, 28, 28), dtype=torch.uint8).numpy().tobytes()
        images = struct.pack(">IIII", 0x0803, count, 28, 28) + pixels
        labels = struct.pack(">II", 0x0801, count) + bytes(range(count))
        (data / f"{part}-images-idx3-ubyte").write_bytes(images)
        (data / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    sizes = dict(conv_channels=2, capsule_maps=1, parent_dim=4, decoder_hidden=(3,), classes=6)
    net = gc.CapsNet(gc.CapsNetConfig(**sizes))
    write_run(folder / "run", net, dataset=data)
    sheet = Image.new("RGB", (60, 60), (250, 250, 240))
    sheet.paste((20, 20, 60), (28, 10, 34, 50))
    sheet.save(folder / "digit.png")
    sheet.save(folder / "digit.jpg")
    settings = json.loads((folder / "run" / "settings.json").read_text())
    settings["settings"] |= {"dataset": "digits", "data_dir": "nowhere"}
    (folder / "run" / "settings.json").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(report, "sections", lambda _: [])  # figures take seconds
        for command in COMMANDS.values():
            assert run(command) == (0, "")
        yield folder


COMMANDS = {
    "evaluate": ["evaluate", "run", "--device", "cpu"],
    "report": ["report", "run", "--device", "cpu", "--output", "report.html"],
    "png": ["predict", "digit.png", "--run-dir", "run"],
    "jpg": ["predict", "digit.jpg", "--run-dir", "run"],
}
READ = {
    "run/best/model.json": ["evaluate", "png"],
    "run/best/model.safetensors": ["evaluate", "png"],
    "run/settings.json": ["evaluate", "report"],
    "run/metrics.jsonl": ["report"],
    "run/result.json": ["report"],
    "digits/train-images-idx3-ubyte": ["evaluate"],
    "digits/t10k-images-idx3-ubyte": ["evaluate"],
    "digits/t10k-labels-idx1-ubyte.gz": ["evaluate"],
    "digit.png": ["png"],
    "digit.jpg": ["jpg"],
}
JSON = [file for file in READ if ".json" in file]


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy that a test may damage, as the working directory."""
    copy = shutil.copytree(whole, tmp_path / "place")
    monkeypatch.chdir(copy)
    return copy


@contextmanager
def limits():
    """Fail if a command hangs or uses too much memory."""

    def hangs(*_):
        raise TimeoutError(f"did not end in {PATIENCE} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + MEMORY


def run(command):
    """The program in this process: its exit status and what it said on standard error."""
    out, err = io.StringIO(), io.StringIO()
    arguments, sys.argv = sys.argv, ["graphcaps", *command]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            return cli.main(), err.getvalue()
    finally:
        sys.argv = arguments


def check(place, file, must_fail=False):
    """Check that every command that reads the file works, or names the damaged file in one line."""
    for name in READ[file]:
        with limits():
            status, said = run(COMMANDS[name])
        assert "Traceback" not in said and "should not have happened" not in said, said
        if status == 0 and not must_fail:
            continue
        assert status == 1
        assert said.startswith("graphcaps: ") and said.count("\n") == 1, said
        # the net's two files are compared with each other, images with their labels
        alike = {Path(file).name, Path(file).parent.name, "no run at run", "no trained net at run"}
        assert any(part in said for part in alike - {""}), said


TABLE = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "GIF": lambda path: path.write_bytes(b"GIF89a" * 100),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "in UTF-16": lambda path: path.write_bytes("{}".encode("utf-16")),
    "nested": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "sparse": lambda path: os.truncate(path, 1 << 31),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a link to zeros": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "packed": lambda path: path.write_bytes(gzip.compress(bytes(1 << 26), 1)),
}


@pytest.mark.parametrize("damage", TABLE.values(), ids=TABLE.keys())
@pytest.mark.parametrize("file", READ)
def test_a_file_that_is_something_else_is_named(place, file, damage):
    damage(place / file)
    # of metrics.jsonl what is before the damage is shown; a result that is no file is none
    check(place, file, must_fail=file not in ("run/metrics.jsonl", "run/result.json"))


WRONG = [None, True, -1, 0, 1.5, 1e308, 10**30, "x", "x" * 2000, "\0", [], [1, "x"], {}, {"a": 1}]


def paths_in(value, path=()):
    """The paths of all values in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        yield (*path, key)
        if isinstance(each, dict | list):
            yield from paths_in(each, (*path, key))


@some
@given(st.data())
@pytest.mark.parametrize("file", JSON)
def test_records_with_wrong_values_are_named(place, file, data):
    original = (place / file).read_bytes()
    lines = original.splitlines() if file.endswith(".jsonl") else [original]
    number = data.draw(st.integers(0, len(lines) - 1))
    content = json.loads(lines[number])
    path = data.draw(st.sampled_from(list(paths_in(content))))
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    kind = data.draw(st.sampled_from(["replaced", "missing", "unknown"]))
    if kind == "replaced":
        inside[path[-1]] = data.draw(st.sampled_from(WRONG))
    elif kind == "missing":
        del inside[path[-1]]
    elif isinstance(inside, dict):
        inside["unknown"] = data.draw(st.sampled_from(WRONG))
    lines[number] = json.dumps(content).encode()
    (place / file).write_bytes(b"\n".join(lines))
    try:
        check(place, file)
    finally:
        (place / file).write_bytes(original)


@some
@given(st.data())
@pytest.mark.parametrize("file", READ)
def test_files_with_damaged_bytes_are_named_or_read(place, file, data):
    original = (place / file).read_bytes()
    damaged = bytearray(original)
    # headers are short, and what they say matters more than what follows
    where = st.integers(0, len(original) - 1) | st.integers(0, min(60, len(original) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        start, length = data.draw(where), data.draw(st.sampled_from([1, 1, 2, 4, 8]))
        new = data.draw(st.binary(max_size=length) | st.sampled_from([b"\xff" * 4, bytes(4)]))
        damaged[start : start + length] = new
    if data.draw(st.booleans()):
        del damaged[data.draw(where) :]
    (place / file).write_bytes(damaged)
    try:
        check(place, file)
    finally:
        (place / file).write_bytes(original)
