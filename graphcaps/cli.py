"""The commands of the program and their flags; `graphcaps --help` shows them."""

import errno
import io
import logging
import os
import platform
import shlex
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from reprlib import repr as short_repr
from typing import Annotated

import torch
import tyro

from graphcaps import __version__, engines
from graphcaps._dgl import dgl, has_cuda
from graphcaps.data.datasets import DATASETS, FETCHED, load_dataset
from graphcaps.data.images import read_image
from graphcaps.data.splits import Dataset
from graphcaps.functional import multi_hot
from graphcaps.nets.model import CapsNet, find_net
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.evaluation import as_input, check_lengths, evaluate, fitted
from graphcaps.training.loop import TrainingInterrupt, train
from graphcaps.training.settings import Engine, TrainSettings, given_fields, image_size_of
from graphcaps.training.workers import joined_workers, leads


@dataclass(frozen=True)
class EvaluateSettings:
    """Count the errors of a trained net on test images."""

    run_dir: tyro.conf.Positional[Path]
    """A run's folder, whose best epoch is taken; or a folder with model.safetensors."""
    dataset: str | None = None
    """As for train. Default: the one that the run was trained on."""
    data_dir: Path | None = None
    """Where data sets are kept. Default: where the run had them."""
    engine: Engine = "auto"
    """How messages are passed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True)
class PredictSettings:
    """Tell the digit in image files, with the lengths of all class capsules."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """PNG or JPEG files of any size, dark on light or light on dark, one digit each."""
    run_dir: Path | None = None
    """A run's folder, whose best epoch is taken; or a folder with model.safetensors. Default: the
    net that comes with graphcaps, trained on MNIST."""
    engine: Engine = "auto"
    """How messages are passed."""


@dataclass(frozen=True)
class ReportSettings:
    """Write what there is to see of a run as one HTML file that opens without a network."""

    run_dir: tyro.conf.Positional[Path]
    """The folder of a run that has finished an epoch; its best epoch is taken."""
    output: Path | None = None
    """The file to write. Default: report.html in the run's folder."""
    dataset: str | None = None
    """As for train. Default: the one that the run was trained on."""
    data_dir: Path | None = None
    """Where data sets are kept. Default: where the run had them."""
    engine: Engine = "auto"
    """How messages are passed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True)
class CompareSettings:
    """Train every cell of a table that is not there yet, and write the table.

    Several processes may work on one table. One that was interrupted is gone on with by the same
    command.
    """

    table: tyro.conf.Positional[Path]
    """A TOML file with data sets, seeds, rows of settings and a control, such as
    results/routings.toml. Cells are written into a folder of its name, the table into NAME.md."""
    runs_dir: Path = Path("runs/compare")
    """Where the runs are kept."""
    data_dir: Path = Path("data")
    """Where data sets are kept."""
    engine: Engine = "auto"
    """How messages are passed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True)
class InfoSettings:
    """Show versions, devices, and which engines can run on them and why."""


Command = (
    Annotated[TrainSettings, tyro.conf.subcommand("train")]
    | Annotated[EvaluateSettings, tyro.conf.subcommand("evaluate")]
    | Annotated[PredictSettings, tyro.conf.subcommand("predict")]
    | Annotated[ReportSettings, tyro.conf.subcommand("report")]
    | Annotated[CompareSettings, tyro.conf.subcommand("compare")]
    | Annotated[InfoSettings, tyro.conf.subcommand("info")]
)


@dataclass(frozen=True)
class Program:
    """What is asked for on the command line."""

    command: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[Command]]
    traceback: bool = False
    """Where an error ends the program, show where in it."""


class _NotToldError(OSError):
    """Standard output takes no more: the disk is full, or the reader of a pipe is gone."""


def main() -> int:
    """Run the program; returns its exit status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the program
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not all that is told is in every encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            status = _run(_asked_for())
        except SystemExit as stop:  # help was asked for, or flags are wrong
            status = int(stop.code or 0)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except OSError as error:
        # what is left in the buffer would be tried, and complained about, at the program's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 128 + signal.SIGPIPE
        _complain(f"standard output: {error.strerror}")
        return 1
    return status


def _asked_for() -> Program:
    return tyro.cli(
        Program,
        prog="graphcaps",
        description="Capsule networks routed by message passing on DGL graphs.",
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.CascadeSubcommandArgs),
    )


def _run(program: Program) -> int:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("graphcaps").setLevel(logging.INFO)  # what is fetched, and from where
    try:
        match program.command:
            case TrainSettings():
                _train(program.command)
            case EvaluateSettings():
                _evaluate(program.command)
            case PredictSettings():
                _predict(program.command)
            case ReportSettings():
                _report(program.command)
            case CompareSettings():
                _compare(program.command)
            case InfoSettings():
                _info()
    except TrainingInterrupt as interrupt:
        run = shlex.quote(str(interrupt.run))
        again = interrupt.again or f"{_program()} train --run-dir {run} --resume"
        _complain(f"{interrupt}\nGo on with: {again}")
        return 130
    except _NotToldError:
        raise
    except Exception as error:
        if program.traceback:
            traceback.print_exc()
        _complain(_message(error))
        return 1
    return 0


def _train(settings: TrainSettings) -> None:
    result = train(settings, given_fields(sys.argv))
    if not leads():
        return
    _say(
        f"Test accuracy {result['test_accuracy']:.2%} "
        f"({result['test_errors']} errors in {result['test_images']:,} images of "
        f"{result['dataset']}), weights of epoch {result['best_epoch']}, the best on the "
        f"hold-out; {result['seconds']:.0f} s of training.\n"
        f"The run's files are in {result['run']}"
    )


def _evaluate(settings: EvaluateSettings) -> None:
    model = CapsNet.load(find_net(settings.run_dir), engine=settings.engine)
    with joined_workers(settings.device) as workers:
        data = fitted(_load_data(settings, model), model)
        score = evaluate(model.to(workers.device), data.test)
    _say(
        f"Test accuracy {score.accuracy:.2%} "
        f"({score.errors} errors in {score.images:,} images of {data.name}), loss {score.loss:.4f}"
    )


@torch.no_grad()
def _predict(settings: PredictSettings) -> None:
    if not settings.images:
        raise ValueError("expected image files to look at; got none; see graphcaps predict --help")
    if settings.run_dir is None:
        model = CapsNet.from_pretrained(engine=settings.engine)
    else:
        model = CapsNet.load(find_net(settings.run_dir), engine=settings.engine).eval()
    for path in settings.images:
        image = read_image(path, model.config.image_shape, model.config.image_kind)
        (lengths,) = model(as_input(image.unsqueeze(0), model)).lengths
        check_lengths(lengths.unsqueeze(0))
        names = model.config.names
        found = multi_hot(model.classify(lengths.unsqueeze(0)), 1, len(names))[0]
        _say(f"{path}: {' + '.join(names[k] for k in found.nonzero().flatten()) or 'none'}")
        told = zip(names, lengths.tolist(), strict=True)
        _say("  " + "  ".join(f"{name}: {x:.2f}" for name, x in told))


def _report(settings: ReportSettings) -> None:
    # with matplotlib, which the other commands do not need
    from graphcaps.report import check_writable, write_report

    run = RunFolder(settings.run_dir)
    run.settings()  # a folder that is no run is told first
    output = settings.output or settings.run_dir / "report.html"
    check_writable(output)  # before the work, not after it
    model = CapsNet.load(find_net(settings.run_dir), engine=settings.engine)
    with joined_workers(settings.device) as workers:
        data = _load_data(settings, model)
        write_report(run, model.to(workers.device), data, output)
    if run.result() is None:
        _say("The run is not finished: the report shows its best epoch so far, and says so.")
    _say(f"The report is in {output}; open it in a browser")


def _compare(settings: CompareSettings) -> None:
    from graphcaps.compare import compare

    asked = TrainSettings(
        data_dir=settings.data_dir, engine=settings.engine, device=settings.device
    )
    compare(settings.table, asked, settings.runs_dir)


def _info() -> None:
    _say(
        f"graphcaps {__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, DGL {dgl.__version__} "
        f"({'with' if has_cuda() else 'without'} CUDA)"
    )
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        _say(f"{device} ({name}): engine auto is {engines.choose('auto', device)}")
        for engine in engines.ENGINES:
            _say(f"  {engine:8} {engines.why_not(engine, device) or 'can run'}")
    if not torch.cuda.is_available():
        _say("no CUDA device")


def _load_data(settings: EvaluateSettings | ReportSettings, model: CapsNet) -> Dataset:
    """The data set that is asked for, else the one that the run was trained on, for its net."""
    run, data_dir = settings.run_dir, settings.data_dir
    channels, height, width = model.config.image_shape
    try:
        started = RunFolder(run).settings().settings
    except FileNotFoundError:
        started = None
    scaled = model.config.image_kind == "picture" or (started and image_size_of(started))
    size = (height, width) if scaled else None
    load = partial(load_dataset, image_size=size, channels=channels if scaled else None)
    if settings.dataset is not None:
        return load(settings.dataset, data_dir or TrainSettings.data_dir)
    if started is None:
        raise ValueError(f"{run} does not say what it was trained on: add --dataset")
    dataset, of_run = started.dataset, started.data_dir
    if dataset not in DATASETS and not os.path.exists(dataset):
        raise ValueError(
            f"{run} was trained on {short_repr(dataset)}, which is not here: "
            "name the folder where it is with --dataset"
        )
    if data_dir is None and dataset in FETCHED and not of_run.is_dir():
        raise ValueError(
            f"{run} had its data in {of_run}, which is not here: add --data-dir FOLDER, where "
            f"{dataset} is, or is to be kept"
        )
    return load(dataset, data_dir or of_run)


def _say(text: str) -> None:
    try:
        print(_shown(text), flush=True)
    except OSError as error:
        raise _NotToldError(error.errno, error.strerror) from None


def _complain(message: str) -> None:
    who = f"graphcaps[{os.environ['RANK']}]" if "RANK" in os.environ else "graphcaps"
    with suppress(OSError):  # there is nobody else to complain to
        print(f"{who}: {_shown(message)}", file=sys.stderr, flush=True)


def _shown(text: str) -> str:
    """Text without what a terminal would obey, or names of files without what is no text."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _program() -> str:
    """How this program was called, so that a hint can be pasted."""
    called = sys.argv[0]
    return "python -m graphcaps" if called.endswith("__main__.py") else called


def _message(error: Exception) -> str:
    match error:
        case OSError(strerror=str(reason)):
            return f"{error.filename}: {reason}" if error.filename else reason
        case ValueError() | OSError() | RuntimeError():
            return str(error)
        case ModuleNotFoundError(name=str(name)):
            return f'this needs {name}: pip install "graphcaps[train]"'
        case MemoryError():
            return f"out of memory ({error})" if str(error) else "out of memory"
    first_line = str(error).partition("\n")[0]
    return (
        f"{type(error).__name__}: {first_line}\n"
        "This should not have happened; add --traceback to see where it did"
    )
