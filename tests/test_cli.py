"""The program as a person uses it: from flags to the screen."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graphcaps import cli
from graphcaps.data import load_dataset

DIGITS = Path(__file__).parent / "digits"


@pytest.fixture
def graphcaps(monkeypatch, capsys):
    """Run the program with these arguments: exit status, standard output, standard error."""

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
    """A net trained by the program on the shipped digits, well enough to tell some."""
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
    told = [int(line.rsplit(": ")[1]) for line in lines[::2]]
    right = sum(a == b for a, b in zip(told, data.test.labels[:30].tolist(), strict=True))
    assert right >= 20  # 3 by chance
    lengths = [float(x.split(":")[1]) for x in lines[1].strip().split("  ")]
    assert len(lengths) == 10
    assert lengths.index(max(lengths)) == told[0]


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


def test_info_says_which_engines_can_run(graphcaps):
    status, out, _ = graphcaps("info")
    assert status == 0
    assert "engine auto is fused" in out
    for engine in ("fused", "udf", "builtin", "scatter"):
        assert f"{engine:8} can run" in out


@pytest.mark.parametrize(
    "command", [(), ("train",), ("evaluate",), ("predict",), ("report",), ("info",)]
)
def test_help_is_there_for_every_command(command, graphcaps):
    status, out, _ = graphcaps(*command, "--help")
    assert status == 0
    assert "usage: graphcaps" in out


def test_python_m_graphcaps_is_the_program():
    done = subprocess.run(
        [sys.executable, "-m", "graphcaps", "--help"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "usage: graphcaps" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict"], "expected image files to look at; got none"),
        (["train", "--dataset", "mnits"], "mnits"),
        (["train", "--dataset", DIGITS, "--epochs", "0"], "epochs must be at least 1"),
        (["train", "--dataset", DIGITS, "--iterations", "0"], "iterations must be at least 1"),
        (["train", "--dataset", DIGITS, "--device", "abacus"], "unknown device 'abacus'"),
        (["train", "--dataset", DIGITS, "--device", "cuda:7"], "device 'cuda:7' is not there"),
        (["train", "--resume"], "add --run-dir FOLDER"),
        (["train", "--resume", "--run-dir", "nowhere"], "no run at nowhere"),
        (["train", "--dataset", DIGITS, "--run-dir", DIGITS], "exists already"),
        (["predict", "--run-dir", "nowhere"], "got none"),
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
    settings["settings"]["dataset"] = str(tmp_path / "moved")
    (copied / "settings.json").write_text(json.dumps(settings))
    status, _, err = graphcaps("report", copied)
    assert status == 1
    assert f"got '{tmp_path / 'moved'}'" in err
    status, _, _ = graphcaps("report", copied, "--dataset", DIGITS)
    assert status == 0


def test_a_report_that_cannot_be_written_is_named(copied, graphcaps):
    for output in (copied, copied / "settings.json" / "report.html"):
        status, _, err = graphcaps("report", copied, "--output", output)
        assert status == 1
        assert str(output) in err
