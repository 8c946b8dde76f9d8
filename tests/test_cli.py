"""The command-line program, from its arguments to its output."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import graphcaps as gc
from graphcaps import cli, commands
from graphcaps.data.datasets import load_dataset
from graphcaps.nets.model import PRETRAINED

DIGITS = Path(__file__).parent / "digits"


@pytest.fixture
def graphcaps(monkeypatch, capsys):
    """Run the program; returns exit status, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["graphcaps", *map(str, arguments)])
        capsys.readouterr()
        try:
            status = cli.main()
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A net trained by the program on the digits in tests/, well enough to recognise some."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = [
        sys.executable,
        "-m",
        "graphcaps",
        "train",
        "--run-dir",
        str(folder),
        "--device",
        "cpu",
    ]
    command += ["--dataset", str(DIGITS), "--epochs", "12", "--batch-size", "24"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_training_says_what_why_and_where(trained):
    folder, out = trained
    assert "Training the small net: the paper's net is for CUDA" in out
    assert f"The run's files are in {folder}" in out
    assert sorted(os.listdir(folder)) == [
        "best",
        "checkpoints",
        "metrics.jsonl",
        "result.json",
        "settings.json",
    ]


def test_evaluating_a_run_repeats_its_test(trained, graphcaps):
    folder, out = trained
    said = next(line for line in out.splitlines() if line.startswith("Test accuracy"))
    status, out, _ = graphcaps("evaluate", folder, "--device", "cpu")
    assert status == 0
    assert out.split(" of ")[0] == said.split(" of ")[0]
    assert int(out.split("(")[1].split()[0]) < 30  # of 100; a net that learnt nothing has 90


def test_a_net_on_300_digits_tells_most_of_the_others_from_image_files(
    trained, graphcaps, tmp_path
):
    folder, _ = trained
    data = load_dataset(str(DIGITS))
    files = []
    for number in range(30):
        pixels = data.test.images[number, 0].numpy()
        paper = 255 - np.kron(np.pad(pixels, 6), np.ones((7, 7), dtype=np.uint8))
        files.append(tmp_path / f"{number}.{'png' if number % 2 else 'jpg'}")
        Image.fromarray(paper).save(files[-1])
    status, out, _ = graphcaps("predict", *files, "--run-dir", folder)
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == 60
    lengths = [[float(x.split(":")[1]) for x in line.split("  ")[1:]] for line in lines[1::2]]
    assert {len(of_image) for of_image in lengths} == {10}
    longest = [of_image.index(max(of_image)) for of_image in lengths]
    right = sum(a == b for a, b in zip(longest, data.test.labels[:30].tolist(), strict=True))
    assert right >= 20  # 3 by chance
    for line, of_image in zip(lines[::2], longest, strict=True):  # what it says is that, or doubt
        assert line.rsplit(": ")[1] == str(of_image) or "digit" in line.rsplit(": ")[1]


def test_without_a_run_the_shipped_net_tells_the_digit(graphcaps, tmp_path):
    data = load_dataset(str(DIGITS))
    files = []
    for number in range(5):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(255 - data.test.images[number, 0].numpy()).save(files[-1])
    status, out, _ = graphcaps("predict", *files)
    assert status == 0
    told = [int(line.rsplit(": ")[1]) for line in out.splitlines()[::2]]
    assert told == data.test.labels[:5].tolist()


def test_what_is_no_digit_is_said_to_be_none(graphcaps, tmp_path):
    cross, noise = Image.new("L", (100, 100), 255), np.random.default_rng(0)
    ImageDraw.Draw(cross).line([(25, 20), (75, 80)], 0, 9)
    ImageDraw.Draw(cross).line([(75, 20), (25, 80)], 0, 9)
    cross.save(tmp_path / "cross.png")
    Image.fromarray(noise.integers(0, 256, (28, 28), np.uint8)).save(tmp_path / "noise.png")
    for name in ("cross.png", "noise.png"):
        status, out, _ = graphcaps("predict", tmp_path / name)
        assert status == 0
        assert out.splitlines()[0].endswith(f"{name}: no digit")


def test_a_demo_is_written_of_the_shipped_net_and_of_a_run(trained, copied, graphcaps, tmp_path):
    output = tmp_path / "new" / "demo.html"
    status, out, _ = graphcaps("demo", "--output", output)
    assert status == 0
    assert str(output) in out
    assert "mnist-small" in output.read_text(encoding="utf-8")
    status, _, _ = graphcaps("demo", copied, "--output", output)
    assert status == 0
    assert f"graphcaps · {copied.name}<" in output.read_text(encoding="utf-8")
    status, _, err = graphcaps("demo", "--dataset", DIGITS, "--output", output)
    assert status == 1
    assert "has its own images" in err
    status, _, err = graphcaps("demo", "--output", tmp_path)
    assert status == 1
    assert "got the folder" in err


def test_info_says_which_engines_can_run(graphcaps):
    status, out, _ = graphcaps("info")
    assert status == 0
    assert "engine auto is fused" in out
    for engine in ("fused", "udf", "builtin", "scatter"):
        assert f"{engine:8} can run" in out


NAMES = ("train", "evaluate", "predict", "report", "demo", "compare", "info")
COMMANDS = [(), *((name,) for name in NAMES)]


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(command, columns, graphcaps, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, _ = graphcaps(*command, "--help")
    assert status == 0
    usage, *lines = out.splitlines()  # tyro leaves it to the terminal to break the usage
    assert usage.startswith("usage: graphcaps")
    assert max(map(len, lines)) <= columns


def test_help_is_in_sentences_that_only_the_terminal_breaks(graphcaps, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # so that each is one line
    # a flag and its text are on one line, or on two if the flag is long
    flag = r"(?:--[a-z]\S*|IMAGE|\[?RUN-DIR\]?|TABLE\S*)(?: \S+)*"
    entry = re.compile(rf"^(?:{flag}(?: {{2,}}|\n)|• \w+ +)(.+)$", re.MULTILINE)
    for command in COMMANDS:
        _, out, _ = graphcaps(*command, "--help")
        assert "None" not in out
        _, _, entries = out.partition("show this help message and exit")
        lines = "\n".join(line.strip("│ ") for line in entries.splitlines())
        for text in entry.findall(lines):
            assert re.fullmatch(r"[A-Z].*\.( \(.*\))?", text), text
        rest = entry.sub("", lines)
        assert re.fullmatch(r"[-─╭╮╰╯\s]*(subcommands[-─╭╮╰╯\s]*\(required\))?[-─╭╮╰╯\s]*", rest)


def test_help_and_version_need_neither_torch_nor_dgl_nor_numba():
    program = """
import runpy, sys
sys.modules["dgl"] = None  # as if it were not installed
for arguments in (["--version"], ["--help"], ["train", "--help"]):
    sys.argv = ["graphcaps", *arguments]
    try:
        runpy.run_module("graphcaps", run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0
    assert not {"torch", "numba", "numpy", "matplotlib"} & set(sys.modules)
sys.argv = ["graphcaps", "info"]
runpy.run_module("graphcaps", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    version, usage = done.stdout.splitlines()[:2]
    assert version == f"graphcaps {gc.__version__}"
    assert usage.startswith("usage: graphcaps")
    needs = "graphcaps routes on DGL graphs, and DGL is not installed"
    assert done.stderr == f"graphcaps: {needs}: python -m graphcaps.install_dgl\n"
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict"], "expected at least one image file"),
        (["train", "--dataset", "mnits"], "mnits"),
        (["train", "--dataset", DIGITS, "--epochs", "0"], "epochs must be at least 1"),
        (["train", "--dataset", DIGITS, "--iterations", "0"], "iterations must be at least 1"),
        (["train", "--dataset", DIGITS, "--device", "abacus"], "unknown device 'abacus'"),
        (["train", "--dataset", DIGITS, "--device", "cuda:7"], "device 'cuda:7' is not there"),
        (["train", "--resume"], "add --run-dir FOLDER"),
        (["train", "--resume", "--run-dir", "nowhere"], "no run at nowhere"),
        (["train", "--dataset", DIGITS, "--run-dir", DIGITS], "exists already"),
        (["predict", "--run-dir", "nowhere"], "at least one image file"),
        (["evaluate", "nowhere"], "no trained net at nowhere"),
        (["predict", "digit.png", "--run-dir", "nowhere"], "no trained net at nowhere"),
        (["report", "nowhere"], "no run at nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_clear_message(
    arguments, said, graphcaps, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, _, err = graphcaps(*arguments)
    assert status == 1
    assert err.startswith("graphcaps: ")
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["train", "--engine", "dense"],
        ["train", "--epochs", "many"],
        ["train", "--no-such-flag"],
        ["evaluate"],
        ["report"],
    ],
)
def test_wrong_flags_are_refused_with_a_hint(arguments, graphcaps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = graphcaps(*arguments)
    assert status == 2
    assert "--help" in out + err


def test_weights_without_a_run_are_evaluated_on_the_data_that_is_named(trained, graphcaps):
    status, _, err = graphcaps("evaluate", trained[0] / "best")
    assert status == 1
    assert "add --dataset" in err
    status, out, _ = graphcaps("evaluate", trained[0] / "best", "--dataset", DIGITS)
    assert status == 0
    assert "errors in 100 images" in out


def test_a_program_without_its_packages_says_what_to_install():
    program = "import sys; sys.modules['tyro'] = None; from graphcaps.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.stderr == 'graphcaps: the program needs tyro: pip install "graphcaps[train]"\n'


def test_a_command_without_its_packages_says_what_to_install(trained):
    program = f"""
import sys
sys.modules["matplotlib"] = None
sys.argv[1:] = ["report", {str(trained[0])!r}]
from graphcaps.__main__ import main
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    said = r'graphcaps: this needs matplotlib\S*: pip install "graphcaps\[train\]"\n'
    assert re.fullmatch(said, done.stderr)


@pytest.fixture
def digit(tmp_path):
    """An image of a digit whose file name is not valid text."""
    pixels = load_dataset(str(DIGITS)).test.images[0, 0].numpy()
    path = tmp_path / os.fsdecode(b"digit-\xff\x1b[2J-\xc3\x97.png")  # × in UTF-8
    Image.fromarray(pixels).save(path, format="png")
    return path


def test_a_name_that_is_no_text_is_told_without_what_a_terminal_would_obey(graphcaps, digit):
    status, out, _ = graphcaps("predict", digit)
    assert status == 0
    assert r"digit-\udcff\x1b[2J-×.png: " in out
    digit.write_bytes(b"")
    status, _, err = graphcaps("predict", digit)
    assert status == 1
    assert r"digit-\udcff\x1b[2J-×.png: expected an image" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "koi8-r", "latin-1", "utf-8"])
def test_any_encoding_of_the_output_will_do(graphcaps, digit, encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    status, _, err = graphcaps("predict", digit)
    assert (status, err) == (0, "")
    times = "×" if encoding in ("latin-1", "utf-8") else r"\xd7"
    assert f"-{times}.png: " in stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("command", [("--help",), ("predict", "--help"), ("info",), ("predict", 0)])
def test_an_output_that_takes_nothing_is_told_once(graphcaps, digit, monkeypatch, command):
    arguments = [digit if argument == 0 else argument for argument in command]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, err = graphcaps(*arguments)
        monkeypatch.undo()  # and closing it, as the end of the program does, raises nothing
    assert status == 1
    assert err == "graphcaps: standard output: No space left on device\n"


def test_a_reader_that_is_gone_ends_the_program_without_a_word(graphcaps, digit, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        status, _, err = graphcaps("predict", digit)
        monkeypatch.undo()
    assert status == 128 + signal.SIGPIPE
    assert err == ""


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
@pytest.mark.parametrize("command", [("info",), ("evaluate", "nowhere"), ("--help",), ("fly",)])
def test_a_closed_stream_is_no_error(graphcaps, monkeypatch, closed, command):
    monkeypatch.setattr(sys, closed, None)
    status, out, _ = graphcaps(*command)
    assert status == {"evaluate": 1, "fly": 2}.get(command[0], 0)
    assert command[0] == "info" or closed == "stdout" or "nowhere" not in out


@pytest.mark.parametrize("library", ["libtorch_cpu.so", "libdgl"])
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to see imports in")
def test_ctrl_c_while_it_is_importing_is_one_line(library):
    command = [sys.executable, "-m", "graphcaps", "info"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        while library not in Path(f"/proc/{program.pid}/maps").read_text():
            time.sleep(0.01)
        program.send_signal(signal.SIGINT)
        assert program.communicate()[1] == "graphcaps: interrupted\n"
    assert program.returncode == 128 + signal.SIGINT


def test_ctrl_c_after_the_imports_is_one_line(graphcaps, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for module, function in ((commands, "run"), (cli, "parse")):
        monkeypatch.setattr(module, function, interrupted)
        assert graphcaps("info") == (130, "", "graphcaps: interrupted\n")


def test_what_should_not_happen_is_one_line_too_and_shown_in_full_on_request(monkeypatch, capsys):
    def broken():
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(commands, "_info", broken)
    for flags in ([], ["--traceback"]):
        monkeypatch.setattr(sys, "argv", ["graphcaps", "info", *flags])
        assert cli.main() == 1
        err = capsys.readouterr().err
        assert "graphcaps: KeyError: 'first line" in err
        assert ("Traceback" in err and "in broken" in err) == bool(flags)


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_traceback_of_an_error_is_shown_on_request(monkeypatch, capsys, place):
    command = ["--traceback", "evaluate", "nowhere"]
    arguments = command if place == "before" else [*command[1:], command[0]]
    monkeypatch.setattr(sys, "argv", ["graphcaps", *arguments])
    assert cli.main() == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and "in find_net" in err
    assert err.splitlines()[-1].startswith("graphcaps: no trained net at nowhere")


@pytest.mark.parametrize("device", ["hpu", "xla", "mps", "meta", "cuda:99", "privateuseone", "é"])
def test_a_device_that_is_not_there_is_one_line(trained, graphcaps, device):
    status, _, err = graphcaps("evaluate", trained[0], "--device", device)
    assert status == 1
    assert f"device '{device}'" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["predict", "evaluate", "report"])
def test_weights_that_are_not_finite_are_refused_by_every_command(
    copied, graphcaps, digit, command
):
    weights = load_file(copied / "best" / "model.safetensors")
    weights["capsules.weight"][0, 0, 0] = torch.nan
    save_file(weights, copied / "best" / "model.safetensors")
    arguments = (digit, "--run-dir", copied) if command == "predict" else (copied,)
    status, out, err = graphcaps(command, *arguments)
    assert (status, out) == (1, "")
    assert "model.safetensors: capsules.weight holds numbers that are not finite" in err


def test_lengths_that_are_not_finite_are_no_answer(graphcaps, digit, tmp_path):
    shutil.copytree(PRETRAINED / "mnist-small", tmp_path / "net")
    weights = load_file(tmp_path / "net" / "model.safetensors")
    weights["capsules.weight"] = weights["capsules.weight"].float() * 1e37
    save_file(weights, tmp_path / "net" / "model.safetensors")
    status, out, err = graphcaps("predict", digit, "--run-dir", tmp_path / "net")
    assert (status, out) == (1, "")
    assert "are not finite for 1 of 1 images" in err
    arguments = ("--dataset", DIGITS, "--device", "cpu")
    status, out, err = graphcaps("evaluate", tmp_path / "net", *arguments)
    assert (status, out) == (1, "")
    assert "are not finite for 100 of 100 images" in err


@pytest.mark.parametrize("content", [b"", b"GIF89a" * 9, b"\x89PNG\r\n\x1a\n"])
def test_a_picture_that_is_none_is_named(content, trained, graphcaps, tmp_path):
    path = tmp_path / "digit.png"
    path.write_bytes(content)
    status, _, err = graphcaps("predict", path, "--run-dir", trained[0])
    assert status == 1
    assert str(path) in err


def test_a_picture_that_is_not_there_is_named(trained, graphcaps, tmp_path):
    status, _, err = graphcaps("predict", tmp_path / "digit.png", "--run-dir", trained[0])
    assert status == 1
    assert "digit.png" in err
    assert "No such file" in err


def test_weights_cut_short_are_named(trained, graphcaps, tmp_path):
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((trained[0] / "best" / name).read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    status, _, err = graphcaps("evaluate", tmp_path, "--dataset", DIGITS)
    assert status == 1
    assert f"{weights} is truncated" in err


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained run that a test may change."""
    return Path(shutil.copytree(trained[0], tmp_path / "copied"))


def test_a_report_of_a_run_is_one_file_in_its_folder(copied, graphcaps):
    status, out, err = graphcaps("report", copied, "--device", "cpu")
    assert status == 0, err
    assert out == f"The report is in {copied / 'report.html'}; open it in a browser\n"
    text = (copied / "report.html").read_text(encoding="utf-8")
    errors = json.loads((copied / "result.json").read_text())["test_errors"]
    assert f"classified correctly: {errors} errors" in text
    assert "not finished" not in text


def test_a_report_goes_where_it_is_told(copied, graphcaps, tmp_path):
    output = tmp_path / "new folder" / "mine.html"
    status, out, _ = graphcaps("report", copied, "--output", output)
    assert status == 0
    assert str(output) in out
    assert output.is_file()
    assert not (copied / "report.html").exists()


def test_a_report_of_a_run_that_is_not_finished_says_so(copied, graphcaps):
    (copied / "result.json").unlink()
    status, out, _ = graphcaps("report", copied)
    assert status == 0
    assert "The run is not finished" in out
    assert "This run is not finished" in (copied / "report.html").read_text(encoding="utf-8")


def test_a_run_before_its_first_epoch_has_no_report(copied, graphcaps):
    shutil.rmtree(copied / "best")
    status, _, err = graphcaps("report", copied)
    assert status == 1
    assert "expected the folder of a run that has finished an epoch" in err


def test_a_report_needs_the_images_and_says_which(copied, graphcaps, tmp_path):
    settings = json.loads((copied / "settings.json").read_text())
    settings["settings"]["dataset"] = "/moved"
    (copied / "settings.json").write_text(json.dumps(settings))
    status, _, err = graphcaps("report", copied)
    assert status == 1
    assert f"{copied} was trained on '/moved', which is not here" in err
    assert "--dataset" in err
    status, _, _ = graphcaps("report", copied, "--dataset", DIGITS)
    assert status == 0


def test_a_run_of_another_machine_makes_no_folder_of_that_machine_here(copied, graphcaps, tmp_path):
    settings = json.loads((copied / "settings.json").read_text())
    there = tmp_path / "home of another" / "data"
    settings["settings"] |= {"dataset": "mnist", "data_dir": str(there)}
    (copied / "settings.json").write_text(json.dumps(settings))
    for command in ("evaluate", "report"):
        status, _, err = graphcaps(command, copied)
        assert status == 1
        assert f"had its data in {there}, which is not here: add --data-dir" in err
        assert not there.parent.exists()


@pytest.fixture
def no_work(monkeypatch):
    """Make all slow functions fail, so that a test shows that none of them is called."""

    def work(*_, **__):
        pytest.fail("worked before it looked at the output")

    monkeypatch.setattr(commands, "load_dataset", work)
    monkeypatch.setattr(commands, "find_net", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, f"new/{'x' * 256}/b", "a/" * 3000 + "b"])
def test_an_output_whose_name_is_too_long_is_refused_before_any_work(copied, graphcaps, name):
    status, _, err = graphcaps("report", copied, "--output", copied / name)
    assert status == 1
    assert "File name too long" in err
    assert not (copied / "new").exists()


def test_a_report_that_cannot_be_written_is_named(copied, graphcaps):
    for output in (copied, copied / "settings.json" / "report.html"):
        status, _, err = graphcaps("report", copied, "--output", output)
        assert status == 1
        assert str(output) in err
