"""Runs of earlier versions of graphcaps can still be resumed, evaluated and reported."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from graphcaps import cli
from graphcaps.nets.model import PRESETS, CapsNetConfig
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.loop import train
from graphcaps.training.settings import TrainSettings

HERE = Path(__file__).parent
OLD = HERE / "run_of_0_1_0"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old run, on the digits that are here now."""
    sizes = dict(conv_channels=4, capsule_maps=1, child_dim=2, parent_dim=4, decoder_hidden=(2,))
    monkeypatch.setitem(PRESETS, "small", CapsNetConfig(**sizes))
    run = RunFolder(Path(shutil.copytree(OLD / "run", tmp_path / "run")))
    settings = run.path / "settings.json"
    settings.write_text(settings.read_text().replace("/home/user/digits", str(HERE / "digits")))
    return run


@pytest.mark.usefixtures("one_thread")
def test_an_old_run_is_resumed_to_where_the_old_version_came(old):
    expected = json.loads((OLD / "result.json").read_text())
    before = old.metrics()
    result = train(TrainSettings(run_dir=old.path, resume=True))
    # this machine may sum in another order than that of the old run
    for name in ("test_loss", "test_accuracy", "holdout_accuracy"):
        assert result[name] == pytest.approx(expected[name], rel=1e-3), name
    for name in ("preset", "test_images", "best_epoch", "epochs"):
        assert result[name] == expected[name], name
    assert old.metrics()[: len(before)] == before
    assert [record["step"] for record in old.metrics()[len(before) :]] == [40, 42, 60, 63, 80, 84]


def test_the_result_of_an_old_run_is_read(old):
    shutil.copy(OLD / "result.json", old.path)
    assert old.result()["test_errors"] == 80
    assert train(TrainSettings(run_dir=old.path, resume=True)) == old.result()


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_an_old_run_is_evaluated_and_reported(old, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["graphcaps", command, str(old.path)])
    assert cli.main() == 0, capsys.readouterr().err
