"""Trains and compares nets: one training for each row, data set and seed of a table.

A comparison is described by a TOML file:

    datasets = ["mnist", "multi-mnist"]
    seeds = [0, 1, 2]
    control = "uniform"             # the row with which the others are compared

    [settings]                      # for all trainings: flags of graphcaps train, with _ for -
    preset = "small"
    epochs = 4

    [rows.uniform]                  # additional settings of a row
    routing = "uniform"

    [rows.dynamic]
    routing = "dynamic"

    [columns.affine-mnist]          # additional settings of a data set; optional
    until_accuracy = 0.992

An optional `note = "…"` at the beginning is printed below the table.

The result of each training, a cell of the table, is written to NAME/ROW--DATASET--SEED.json beside
NAME.toml. The table, NAME.md, is written from these files only.
"""

import json
import math
import os
import re
import statistics
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from graphcaps.data.splits import Split
from graphcaps.files import (
    json_bytes,
    named_in_errors,
    parse_record,
    read_bounded,
    read_record,
    record,
    write_whole,
)
from graphcaps.flags import TrainSettings
from graphcaps.nets.model import CapsNet
from graphcaps.streams import say
from graphcaps.training.checkpoints import RunFolder, RunLockedError
from graphcaps.training.evaluation import as_input
from graphcaps.training.loop import TrainingDivergedError, TrainingInterrupt, load_data_of, train
from graphcaps.training.settings import check_settings
from graphcaps.training.workers import joined_workers

LARGEST_TABLE = 1 << 20  # bytes of a TOML file
LOOKED_AT = 200  # images of the validation set whose coupling is evaluated
DECIDED = 0.5  # a child that couples by more than this to one class has decided
DEAD = 0.1  # a class that gets less than this share of equal coupling is dead
CONFIDENCE = 0.95
OF_A_CELL = ("dataset", "seed", "run_dir", "resume", "data_dir", "engine", "device")
_NAME = re.compile(r"[A-Za-z0-9_.]+(-[A-Za-z0-9_.]+)*")


@record
@dataclass(frozen=True)
class Comparison:
    """The content of a TOML file; settings are fields of `TrainSettings`."""

    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    control: str
    rows: dict[str, dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if self.control not in self.rows:
            raise ValueError(f"control: expected one of {', '.join(self.rows)}; got {self.control}")
        for name in (*self.rows, *map(_named, self.datasets)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"expected a name of letters, digits, _, . and -; got {name!r}")
        for name in self.columns:
            if name not in self.datasets:
                raise ValueError(f"columns.{name}: expected one of {', '.join(self.datasets)}")
        if not self.datasets or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("expected at least one data set, and seeds that differ")


class Place(NamedTuple):
    """A cell's position in the table: row, data set and seed."""

    row: str
    dataset: str
    seed: int

    @property
    def name(self) -> str:
        """The name of the cell's file, without the extension."""
        return f"{self.row}--{_named(self.dataset)}--{self.seed}"


@record
@dataclass(frozen=True, kw_only=True)
class Cell:
    """The result of one training, which is the content of a cell's file."""

    row: str
    dataset: str
    seed: int
    settings: dict[str, Any]  # as the TOML file gives them
    recipe: dict[str, Any]  # the resulting numbers, defaults included
    versions: dict[str, str]
    diverged: str | None = None  # why there is no result
    parameters: int | None = None
    test_accuracy: float | None = None
    test_errors: int | None = None
    test_images: int | None = None
    holdout_accuracy: float | None = None
    best_epoch: int | None = None
    epochs: int | None = None
    seconds_per_epoch: float | None = None  # median, including evaluation on the validation set
    peak_memory: int | None = None  # bytes: of the process, or of the tensors on a GPU
    load: float | None = None  # load average of the machine at the end
    cores: int | None = None
    entropy: float | None = None  # of a child's last coupling, in nats, on the validation set
    decided: float | None = None  # share of children whose largest coupling is above 0.5
    dead: float | None = None  # classes with less than a tenth of equal coupling


def read_comparison(path: Path) -> Comparison:
    """Read a TOML file, and check that every cell can be trained with its settings.

    Args:
        path: the file.

    Raises:
        ValueError: the file is not such a TOML file, or has unknown fields or invalid settings,
            which the message names.
        OSError: the file cannot be read.
    """
    try:
        content = tomllib.loads(read_bounded(path, LARGEST_TABLE).decode())
        encoded = json.dumps(content).encode()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path}: expected TOML with numbers and text: {error}") from None
    comparison = parse_record(encoded, Comparison, str(path))
    for place in places_of(comparison):
        try:
            check_settings(settings_of(comparison, place))
        except ValueError as error:
            raise ValueError(f"{path}: {place.row} on {place.dataset}: {error}") from None
    return comparison


def places_of(comparison: Comparison) -> list[Place]:
    """All cells in the order in which they are trained: all of the first seed, then the next."""
    return [
        Place(row, dataset, seed)
        for seed in comparison.seeds
        for dataset in comparison.datasets
        for row in comparison.rows
    ]


def settings_of(comparison: Comparison, place: Place) -> TrainSettings:
    """The settings of a cell's training.

    Raises:
        ValueError: the file sets an unknown field, or one that the cell or the command sets.
    """
    given = given_for(comparison, place)
    for name in OF_A_CELL:
        if name in given:
            raise ValueError(f"{name}: set by the cell or the command, not in the file")
    asked = given | {"dataset": place.dataset, "seed": place.seed}
    return parse_record(json.dumps(asked).encode(), TrainSettings, "settings")


def given_for(comparison: Comparison, place: Place) -> dict[str, Any]:
    """The settings in the file that apply to a cell: common ones, its data set's, its row's."""
    of_column = comparison.columns.get(place.dataset, {})
    return comparison.settings | of_column | comparison.rows[place.row]


def compare(table: Path, asked: TrainSettings, runs_dir: Path) -> None:
    """Train the cells of a table that are missing, and write their files and the table.

    An unfinished cell is resumed; a cell that another process is training is skipped.

    Args:
        table: the TOML file.
        asked: data_dir, engine and device of all trainings.
        runs_dir: the folder for the runs, one folder for each.

    Raises:
        ValueError, OSError, RuntimeError: as `train`.
        TrainingInterrupt: a signal ended training; everything is saved.
    """
    comparison = read_comparison(table)
    folder, elsewhere = table.with_suffix(""), 0
    with named_in_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    places = places_of(comparison)
    for number, place in enumerate(places, 1):
        file, given = folder / f"{place.name}.json", given_for(comparison, place)
        if file.exists():
            made_with = read_record(file, Cell).settings
            if made_with != given:
                raise ValueError(
                    f"{file} was trained with other settings than {table} has now: {made_with}, "
                    f"not {given}; remove it, and its run in {runs_dir / table.stem / place.name}"
                )
            continue
        say(f"Cell {number} of {len(places)}: {place.row} on {place.dataset}, seed {place.seed}.")
        settings = replace(
            settings_of(comparison, place),
            data_dir=asked.data_dir,
            engine=asked.engine,
            device=asked.device,
            run_dir=runs_dir / table.stem / place.name,
        )
        try:
            cell = train_cell(place, settings, given)
        except RunLockedError:
            elsewhere += 1
            continue
        except TrainingInterrupt as interrupt:
            interrupt.again = "the same command"
            raise
        write_whole(file, json_bytes(asdict(cell)))
        write_table(table)
    write_table(table)
    if elsewhere:
        say(f"{elsewhere} cells are being trained by other processes.")
    say(f"The table is in {table.with_suffix('.md')}, and its cells are in {folder}")


def train_cell(place: Place, settings: TrainSettings, given: dict[str, Any]) -> Cell:
    """Train one cell, or resume its training, and evaluate the net.

    Args:
        place: the cell.
        settings: all settings, including the run's folder.
        given: the settings in the file.

    Returns:
        The cell, also if training diverged.

    Raises:
        RunLockedError: another process is training it.
        Others: as `train`.
    """
    assert settings.run_dir is not None
    run = RunFolder(settings.run_dir)
    with joined_workers(settings.device) as workers:
        device = workers.device
    memory = PeakMemory(device)
    begun = (run.path / "settings.json").exists()
    diverged = None
    try:
        # resuming refuses a run that was started with other settings
        names = {*given, "dataset", "seed", "data_dir", "engine", "device"}
        train(replace(settings, resume=begun), names)
    except TrainingDivergedError as error:
        diverged = str(error)
    started = run.settings()
    cell = Cell(
        **place._asdict(),
        settings=given,
        recipe=asdict(started.recipe),
        versions=started.versions,
        diverged=diverged,
        peak_memory=memory.peak(),
        load=round(os.getloadavg()[0], 2),
        cores=os.cpu_count(),
    )
    result = run.result()
    if result is None:
        return cell
    model = CapsNet.load(run.best, engine=settings.engine).to(device).eval()
    epochs = [r["seconds"] for r in run.metrics() if r["kind"] == "epoch"]
    times = [after - before for before, after in zip([0.0, *epochs], epochs, strict=False)]
    holdout = load_data_of(started.settings).holdout
    entropy, decided, dead = coupling_of(model, holdout)
    return replace(
        cell,
        parameters=sum(p.numel() for p in model.parameters()),
        **{name: result[name] for name in _FROM_RESULT},
        seconds_per_epoch=round(statistics.median(times), 2),
        entropy=entropy,
        decided=decided,
        dead=dead,
    )


_FROM_RESULT = (
    "test_accuracy",
    "test_errors",
    "test_images",
    "holdout_accuracy",
    "best_epoch",
    "epochs",
)


@torch.no_grad()
def coupling_of(model: CapsNet, split: Split) -> tuple[float | None, float | None, float | None]:
    """Summarise the coupling of the class capsules' children at the last iteration.

    Args:
        model: the net.
        split: images, of which the first 200 are used.

    Returns:
        The mean entropy of a child's coupling, in nats; the share of children with a coupling above
        0.5 to one class; and the number of classes whose coupling, summed over all images, is less
        than a tenth of what equal coupling gives. All are None for a net without capsules.
    """
    classes = model.config.classes
    if model.config.routing is None:
        return None, None, None
    _, trace = model(as_input(split.images[:LOOKED_AT], model), return_trace=True)
    entropy = float(trace.entropy()[-1].mean())
    c = trace.c[-1].unflatten(1, (-1, classes))  # [B, I, J]
    shares = c.mean(dim=(0, 1)) * classes
    return (
        round(entropy, 4),
        round(float((c.amax(dim=2) > DECIDED).double().mean()), 4),
        float((shares < DEAD).sum()),
    )


class PeakMemory:
    """Measures the peak memory since its creation.

    On a GPU this is the memory of its tensors, otherwise that of the whole process, on Linux.

    Args:
        device: the device of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = device.type == "cuda"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
                self._known = True

    def peak(self) -> int | None:
        """The peak in bytes, or None if it is not known."""
        if not self._known:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else None


def write_table(table: Path) -> None:
    """Write the table of a comparison, from the files of its cells."""
    text = render(read_comparison(table), read_cells(table))
    write_whole(table.with_suffix(".md"), text.encode())


def read_cells(table: Path) -> list[Cell]:
    """The finished cells of a comparison.

    Raises:
        ValueError: a file is damaged.
    """
    folder = table.with_suffix("")
    places = places_of(read_comparison(table))
    files = [folder / f"{place.name}.json" for place in places]
    return [read_record(file, Cell) for file in files if file.exists()]


def render(comparison: Comparison, cells: Sequence[Cell]) -> str:
    """The table of a comparison in Markdown.

    Args:
        comparison: the content of the TOML file.
        cells: the finished cells.

    Returns:
        For each data set, a table with one line for each row: mean ± standard deviation over the
        seeds, and the mean of the differences from the control with the same seed, with its
        confidence interval.
    """
    parts = []
    for dataset in comparison.datasets:
        here = [cell for cell in cells if cell.dataset == dataset]
        control = {cell.seed: cell.test_accuracy for cell in here if cell.row == comparison.control}
        rows = []
        for row in comparison.rows:
            of_row = [cell for cell in here if cell.row == row]
            rows.append([row, *_columns(of_row, {} if row == comparison.control else control)])
        parts.append(f"### {dataset}\n\n{_markdown(_HEAD, rows)}")
    missing = len(places_of(comparison)) - len(cells)
    notes = [f"{missing} cells are not measured yet."] if missing else []
    if any(cell.load and cell.cores and cell.load > cell.cores + 0.5 for cell in cells):
        notes.append("\\* timed while other work shared the machine.")
    if comparison.note:
        notes.append(comparison.note)
    return "\n\n".join([*parts, *notes]) + "\n"


_HEAD = (
    "row",
    "parameters",
    "test accuracy, %",
    "minus control",
    "validation, %",
    "s an epoch",
    "memory, MiB",
    "entropy, nats",
    "decided, %",
    "dead classes",
)


def _columns(cells: Sequence[Cell], control: Mapping[int, float | None]) -> list[str]:
    done = [cell for cell in cells if cell.test_accuracy is not None]
    diverged = sum(cell.diverged is not None for cell in cells)
    failed = f" ({diverged} diverged)" if diverged else ""
    if not done:
        return ["", f"not measured{failed}", *[""] * (len(_HEAD) - 3)]
    pairs = [
        100 * (cell.test_accuracy - other)
        for cell in done
        if cell.test_accuracy is not None and (other := control.get(cell.seed)) is not None
    ]
    shared = any(cell.load and cell.cores and cell.load > cell.cores + 0.5 for cell in done)
    return [
        f"{done[0].parameters:,}",
        _spread(_all(done, "test_accuracy"), 100, 2) + failed,
        _difference(pairs),
        _spread(_all(done, "holdout_accuracy"), 100, 2),
        _spread(_all(done, "seconds_per_epoch"), 1, 1) + ("\\*" if shared else ""),
        _spread(_all(done, "peak_memory"), 1 / 2**20, 0),
        _spread(_all(done, "entropy"), 1, 3),
        _spread(_all(done, "decided"), 100, 1),
        _spread(_all(done, "dead"), 1, 1),
    ]


def _all(cells: Iterable[Cell], name: str) -> list[float]:
    return [value for cell in cells if (value := getattr(cell, name)) is not None]


def _spread(values: Sequence[float], factor: float, digits: int) -> str:
    """Mean ± standard deviation, or a single value, which is marked as such."""
    if not values:
        return ""
    mean = factor * statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:,.{digits}f} (1 seed)"
    return f"{mean:,.{digits}f} ± {factor * statistics.stdev(values):,.{digits}f}"


def _difference(pairs: Sequence[float]) -> str:
    """The mean of differences and its confidence interval."""
    if len(pairs) < 2:
        return f"{pairs[0]:+.2f} (1 seed)" if pairs else ""
    low, high = confidence_interval(pairs)
    return f"{statistics.fmean(pairs):+.2f} ({low:+.2f} to {high:+.2f})"


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean, by Student's t.

    Args:
        values: two or more, assumed to be normally distributed.

    >>> low, high = confidence_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)  # 2 ± 4.303 / √3
    (-0.484, 4.484)
    """
    from scipy.stats import t

    mean, half = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half *= float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return mean - half, mean + half


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _named(dataset: str) -> str:
    """The name of a data set in file names: the last part, if it is a path."""
    return Path(dataset).stem
