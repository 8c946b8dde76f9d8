"""Comparisons: each cell is trained once and saved, and the table is written from the cells."""

import json
import math
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import cli, compare
from graphcaps.data.datasets import load_dataset
from graphcaps.nets.model import PRESETS, CapsNetConfig
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.loop import Trainer, TrainingDivergedError

DIGITS = Path(__file__).parent / "digits"
ROOT = DIGITS.parents[1]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    sizes = dict(conv_channels=4, capsule_maps=1, decoder_hidden=None)
    for name in ("small", "cnn"):
        monkeypatch.setitem(PRESETS, name, CapsNetConfig(**sizes))
    monkeypatch.setitem(PRESETS, "cnn", CapsNetConfig(**sizes, routing=None))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(f"""
datasets = ["{DIGITS}"]
seeds = [3, 5]
control = "even"
[settings]
preset = "small"
epochs = 1
[rows.even]
routing = "uniform"
[rows.plain]
preset = "cnn"
""")
    return path


@pytest.fixture
def graphcaps(monkeypatch, capsys, tmp_path):
    def run(table, *arguments):
        command = ["compare", table, "--runs-dir", tmp_path / "runs", "--engine", "scatter"]
        command += ["--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", ["graphcaps", *map(str, command)])
        capsys.readouterr()
        return (cli.main(), *capsys.readouterr())

    return run


def cells_of(table):
    return {path.stem: json.loads(path.read_text()) for path in table.with_suffix("").iterdir()}


def test_every_cell_is_trained_once_and_kept_with_what_the_table_needs(table, graphcaps, tmp_path):
    status, _, err = graphcaps(table)
    assert status == 0, err
    cells = cells_of(table)
    assert sorted(cells) == [
        "even--digits--3",
        "even--digits--5",
        "plain--digits--3",
        "plain--digits--5",
    ]
    cell = cells["even--digits--5"]
    run = RunFolder(tmp_path / "runs" / "two" / "even--digits--5")
    for name in ("test_accuracy", "test_errors", "holdout_accuracy", "best_epoch"):
        assert cell[name] == run.result()[name]
    (epoch,) = [record for record in run.metrics() if record["kind"] == "epoch"]
    assert cell["seconds_per_epoch"] == round(epoch["seconds"], 2)
    assert cell["settings"] == {"preset": "small", "epochs": 1, "routing": "uniform"}
    assert str(tmp_path) not in json.dumps(cell)  # nothing but the data set tells of this machine
    assert run.settings().settings.seed == 5
    # uniform coupling is as undecided as can be
    assert cell["entropy"] == pytest.approx(math.log(10), abs=1e-3)
    assert (cell["decided"], cell["dead"]) == (0, 0)
    plain = cells["plain--digits--3"]
    assert plain["entropy"] is plain["decided"] is plain["dead"] is None
    assert plain["parameters"] == sum(p.numel() for p in gc.CapsNet.from_preset("cnn").parameters())
    before = {path: path.stat().st_mtime_ns for path in table.with_suffix("").iterdir()}
    status, out, _ = graphcaps(table)
    assert status == 0 and "Cell" not in out
    assert {path: path.stat().st_mtime_ns for path in table.with_suffix("").iterdir()} == before
    assert "not measured" not in table.with_suffix(".md").read_text()


def test_an_interrupted_comparison_goes_on_where_it_was(table, graphcaps, monkeypatch):
    steps, take_step = [], Trainer._take_step

    def interrupted(self, *args):
        steps.append((self.run.path.name, self.step))
        if len(steps) == 6:  # the second of the second cell's four steps
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(self, *args)

    monkeypatch.setattr(Trainer, "_take_step", interrupted)
    table.write_text(table.read_text().replace("epochs = 1", "epochs = 2\nbatch_size = 147"))
    status, _, err = graphcaps(table)
    assert status == 130
    assert "Go on with: the same command" in err
    assert list(cells_of(table)) == ["even--digits--3"]
    assert "3 cells are not measured yet" in table.with_suffix(".md").read_text()
    status, _, err = graphcaps(table)
    assert status == 0, err
    assert len(cells_of(table)) == 4
    assert sorted(steps) == [  # no step of any cell was taken twice
        (f"{row}--digits--{seed}", step)
        for row in ("even", "plain")
        for seed in (3, 5)
        for step in range(4)
    ]


def test_a_cell_that_another_process_trains_is_left_to_it(table, graphcaps, tmp_path):
    run = RunFolder(tmp_path / "runs" / "two" / "even--digits--5")
    with run.locked():
        status, out, _ = graphcaps(table)
    assert status == 0
    assert "1 cells are being trained by other processes" in out
    assert "even--digits--5" not in cells_of(table) and len(cells_of(table)) == 3


def test_a_training_that_diverges_is_a_cell_too(table, graphcaps, monkeypatch):
    train = compare.train

    def diverges(settings, given):
        if settings.seed == 5:
            raise TrainingDivergedError("the loss is not finite at step 3")
        return train(settings, given)

    table.write_text(table.read_text().partition("[rows.plain]")[0])
    graphcaps(table)
    (table.with_suffix("") / "even--digits--5.json").unlink()
    (table.parent / "runs" / "two" / "even--digits--5" / "result.json").unlink()
    monkeypatch.setattr(compare, "train", diverges)
    status, _, err = graphcaps(table)
    assert status == 0, err
    assert cells_of(table)["even--digits--5"]["diverged"] == "the loss is not finite at step 3"
    assert "(1 seed) (1 diverged)" in table.with_suffix(".md").read_text()


def test_cells_that_were_made_with_other_settings_are_not_taken_for_these(table, graphcaps):
    graphcaps(table)
    table.write_text(table.read_text().replace("epochs = 1", "epochs = 2"))
    status, _, err = graphcaps(table)
    assert status == 1 and "was trained with other settings than" in err
    for path in table.with_suffix("").iterdir():
        path.unlink()
    status, _, err = graphcaps(table)
    assert status == 1 and "epochs is 1, not 2" in err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"even"\n', '"odd"\n', "control: expected one of even, plain; got odd"),
        ('routing = "uniform"', 'routeing = "uniform"', "even on .*routeing: unknown field"),
        ('routing = "uniform"', 'routing = "magic"', "even on .*: unknown routing 'magic'"),
        ('routing = "uniform"', "seed = 1", "seed: set by the cell"),
        ("epochs = 1", "epochs = 0", "epochs must be at least 1"),
        ("epochs = 1", 'epochs = "1"', "epochs: expected a valid integer"),
        ("epochs = 1", "epochs = 2020-01-01", "expected TOML with numbers and text"),
        ("[settings]", "[sittings]", "sittings: unknown field"),
        ("seeds = [3, 5]", "seeds = [3, 3]", "seeds that differ"),
        ("[rows.plain]", '[rows."../x"]', "expected a name of letters"),
        ("[rows.plain]", "[columns.mnist]", "columns.mnist: expected one of"),
        ("[rows.plain]", "[rows", "expected TOML"),
    ],
)
def test_what_a_file_asks_for_wrongly_is_named_before_any_training(
    table, graphcaps, tmp_path, old, new, said
):
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=said):
        compare.read_comparison(table)
    assert graphcaps(table)[0] == 1
    assert not (tmp_path / "runs").exists()


def cell(row, seed, accuracy, **others):
    made = compare.Cell(
        row=row,
        dataset="mnist",
        seed=seed,
        settings={},
        recipe={},
        versions={},
        parameters=1234,
        test_accuracy=accuracy,
        holdout_accuracy=0.5,
        seconds_per_epoch=10.0 + seed,
        entropy=2.0,
        peak_memory=2**30,
        decided=0.25,
        dead=1.0,
        load=1.0,
        cores=2,
    )
    return replace(made, **others)


def test_the_table_has_means_and_paired_differences():
    rows = {"even": {}, "odd": {}, "late": {}}
    comparison = compare.Comparison(("mnist",), (0, 1, 2), "even", rows)
    cells = [cell("even", seed, a) for seed, a in enumerate((0.90, 0.92, 0.97))]
    cells += [cell("odd", seed, a) for seed, a in ((2, 0.99), (0, 0.91), (1, 0.95))]
    text = compare.render(comparison, cells)
    even, odd, late = (line.split(" | ") for line in text.splitlines()[4:7])
    # 93 ± √(9 + 1 + 16)/2; pairs 1, 3, 2: mean 2, deviation 1, 4.303 · 1/√3
    assert even[:4] == ["| even", "1,234", "93.00 ± 3.61", ""]
    assert odd[2:4] == ["95.00 ± 4.00", "+2.00 (-0.48 to +4.48)"]
    assert odd[5:7] == ["11.0 ± 1.0", "1,024 ± 0"]
    assert odd[7:] == ["2.000 ± 0.000", "25.0 ± 0.0", "1.0 ± 0.0 |"]
    assert late[1:3] == ["", "not measured"]
    assert text.endswith("\n\n3 cells are not measured yet.\n")
    shared = [replace(c, load=3.5) for c in cells]
    assert "11.0 ± 1.0\\* |" in compare.render(comparison, shared)
    assert "\\* timed while other work shared the machine." in compare.render(comparison, shared)
    told = replace(comparison, note="One thread each.")
    assert compare.render(told, shared).endswith("\n\nOne thread each.\n")
    alone = compare.render(comparison, [cells[0], cells[4]])
    assert "| 91.00 (1 seed) | +1.00 (1 seed) |" in alone


def test_a_cell_is_read_as_it_was_written(tmp_path):
    made = cell("even", 0, 0.9)
    (tmp_path / "cell.json").write_text(json.dumps(asdict(made)))
    assert compare.read_record(tmp_path / "cell.json", compare.Cell) == made


def test_coupling_is_summed_up_over_children_and_images():
    config = CapsNetConfig(conv_channels=4, capsule_maps=2, classes=3, decoder_hidden=None)
    model = gc.CapsNet(config, engine="scatter")
    with torch.no_grad():
        model.primary.conv.weight.mul_(20)
        model.capsules.weight.mul_(20)
        model.capsules.weight.view(-1, 3, 8, 16)[:, 2].mul_(0)  # whose votes agree with nothing
    split = load_dataset(str(DIGITS)).test
    split = split._replace(images=split.images[:5], labels=split.labels[:5])
    with torch.no_grad():
        _, trace = model(split.images / 255, return_trace=True)
    c = trace.c[-1].view(5, 72, 3)
    entropy, decided, dead = compare.coupling_of(model, split)
    logs = torch.where(c > 0, c.log(), 0)
    assert entropy == pytest.approx(float(-(c * logs).sum(dim=2).mean()), abs=1e-4)
    count = sum(max(child) > 0.5 for image in c.tolist() for child in image)
    assert decided == pytest.approx(count / (5 * 72), abs=1e-4)
    assert 0 < count < 5 * 72
    shares = [float(c[:, :, j].mean()) * 3 for j in range(3)]
    assert dead == sum(share < 0.1 for share in shares)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_that_since_it_was_asked_for_and_photos_take_less_than_4_gigabytes():
    resident = compare.PeakMemory(torch.device("cpu")).peak()  # other tests of the process count
    if resident is None:
        pytest.skip("the peak cannot be reset here")
    held = torch.ones(3 << 27)  # 1.5 GiB, which does not count once it is freed
    del held
    memory = compare.PeakMemory(torch.device("cpu"))
    before = memory.peak()
    assert before < resident + 2**29
    held = torch.ones(1 << 26)  # 0.25 GiB
    del held
    assert_close(float(memory.peak() - before), 2.0**28, rtol=0.1, atol=0.0)
    model = gc.CapsNet.from_preset("photo", engine="scatter")
    images, labels = torch.rand(16, 3, 224, 224), torch.arange(16) % 10
    gc.capsnet_loss(model(images, labels), images, labels).backward()
    assert memory.peak() - before < 4e9


@pytest.mark.parametrize("name", ["routings.toml", "presets.toml", "routings-long.toml"])
def test_the_tables_of_this_repository_can_be_trained(name):
    comparison = compare.read_comparison(ROOT / "results" / name)
    cells = len(comparison.datasets) * 3 * len(comparison.rows)
    assert len(compare.places_of(comparison)) == cells  # which checks the settings of each


def test_one_seed_of_every_net_is_trained_before_the_next():
    places = compare.places_of(compare.read_comparison(ROOT / "results" / "routings.toml"))
    assert [place.seed for place in places] == sorted(place.seed for place in places)


class Told(torch.nn.Module):
    """A net whose children have a given coupling."""

    config = CapsNetConfig(classes=4)

    def __init__(self, coupling):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trace = SimpleNamespace(c=coupling.flatten(2), entropy=lambda: torch.ones(1, 2, 3))

    def forward(self, images, return_trace):
        return None, self.trace


def test_a_class_is_dead_that_gets_less_than_a_tenth_of_an_equal_share():
    coupling = torch.tensor([0.9, 0.08, 0.02, 0.0]).expand(1, 2, 3, 4)  # equal would be 0.25
    found = compare.coupling_of(Told(coupling), load_dataset(str(DIGITS)).test)
    assert found == (1.0, 1.0, 2.0)
