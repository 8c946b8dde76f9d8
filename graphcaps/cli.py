"""Flags enter, calls of the library leave; `graphcaps --help` shows them."""

import logging
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from graphcaps import __version__, kernels
from graphcaps._dgl import dgl, has_cuda
from graphcaps.checkpoints import RunFolder
from graphcaps.data import load_dataset
from graphcaps.evaluation import as_input, evaluate
from graphcaps.images import read_digit
from graphcaps.model import CONFIG, CapsNet
from graphcaps.passing import ENGINES
from graphcaps.settings import Engine, TrainSettings
from graphcaps.training import TrainingInterrupt, train
from graphcaps.workers import joined_workers, leads


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
class InfoSettings:
    """Show versions, devices, and which engines can run on them and why."""


Command = (
    Annotated[TrainSettings, tyro.conf.subcommand("train")]
    | Annotated[EvaluateSettings, tyro.conf.subcommand("evaluate")]
    | Annotated[PredictSettings, tyro.conf.subcommand("predict")]
    | Annotated[ReportSettings, tyro.conf.subcommand("report")]
    | Annotated[InfoSettings, tyro.conf.subcommand("info")]
)


def main() -> int:
    """Run the program; returns its exit status."""
    command = tyro.cli(
        Command,
        prog="graphcaps",
        description="Capsule networks routed by message passing on DGL graphs.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    logging.basicConfig(format="%(message)s")
    logging.getLogger("graphcaps").setLevel(logging.INFO)  # what is fetched, and from where
    try:
        match command:
            case TrainSettings():
                _train(command)
            case EvaluateSettings():
                _evaluate(command)
            case PredictSettings():
                _predict(command)
            case ReportSettings():
                _report(command)
            case InfoSettings():
                _info()
    except TrainingInterrupt as interrupt:
        run = shlex.quote(str(interrupt.run))
        _complain(f"{interrupt}\nGo on with: {_program()} train --run-dir {run} --resume")
        return 130
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        _complain(_message(error))
        return 1
    return 0


def _train(settings: TrainSettings) -> None:
    result = train(settings)
    if not leads():
        return
    print(
        f"Test accuracy {result['test_accuracy']:.2%} "
        f"({result['test_errors']} errors in {result['test_images']:,} images of "
        f"{result['dataset']}), weights of epoch {result['best_epoch']}, the best on the "
        f"hold-out; {result['seconds']:.0f} s of training.\n"
        f"The run's files are in {result['run']}"
    )


def _evaluate(settings: EvaluateSettings) -> None:
    model = _load(settings.run_dir, settings.engine)
    dataset, data_dir = _data_of(settings)
    with joined_workers(settings.device) as workers:
        data = load_dataset(dataset, data_dir)
        score = evaluate(model.to(workers.device), data.test)
    print(
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
        model = _load(settings.run_dir, settings.engine).eval()
    for path in settings.images:
        image = read_digit(path, size=model.config.image_size)
        lengths = model(as_input(image.unsqueeze(0), model)).lengths[0]
        print(f"{path}: {int(lengths.argmax())}")
        print("  " + "  ".join(f"{k}: {x:.2f}" for k, x in enumerate(lengths.tolist())))


def _report(settings: ReportSettings) -> None:
    from graphcaps.report import write_report

    run = RunFolder(settings.run_dir)
    run.settings()  # a folder that is no run is told first
    model = _load(settings.run_dir, settings.engine)
    dataset, data_dir = _data_of(settings)
    output = settings.output or settings.run_dir / "report.html"
    with joined_workers(settings.device) as workers:
        data = load_dataset(dataset, data_dir)
        write_report(run, model.to(workers.device), data, output)
    if run.result() is None:
        print("The run is not finished: the report shows its best epoch so far, and says so.")
    print(f"The report is in {output}; open it in a browser")


def _info() -> None:
    print(
        f"graphcaps {__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, DGL {dgl.__version__} "
        f"({'with' if has_cuda() else 'without'} CUDA)"
    )
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        print(f"{device} ({name}): engine auto is {kernels.choose_engine('auto', device)}")
        print(f"  {'fused':8} {kernels.why_not(device) or 'can run'}")
        for engine, kind in ENGINES.items():
            print(f"  {engine:8} {kind.why_not(device) or 'can run'}")
    if not torch.cuda.is_available():
        print("no CUDA device")


def _load(run: Path, engine: str) -> CapsNet:
    folder = run if (run / CONFIG).is_file() else RunFolder(run).best
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"no trained net at {run}: expected the folder of a run that has finished an epoch "
            "(graphcaps train makes one), or one with model.safetensors and model.json"
        )
    return CapsNet.load(folder, engine=engine)


def _data_of(settings: EvaluateSettings | ReportSettings) -> tuple[str, Path]:
    """The data set that is asked for, else the one that the run was trained on; its folder."""
    run, data_dir = settings.run_dir, settings.data_dir
    if settings.dataset is not None:
        return settings.dataset, data_dir or TrainSettings.data_dir
    try:
        started = RunFolder(run).settings()["settings"]
        return started["dataset"], data_dir or Path(started["data_dir"])
    except (FileNotFoundError, KeyError, TypeError):
        raise ValueError(f"{run} does not say what it was trained on: add --dataset") from None


def _complain(message: str) -> None:
    who = f"graphcaps[{os.environ['RANK']}]" if "RANK" in os.environ else "graphcaps"
    print(f"{who}: {message}", file=sys.stderr)


def _program() -> str:
    """How this program was called, so that a hint can be pasted."""
    called = sys.argv[0]
    return "python -m graphcaps" if called.endswith("__main__.py") else called


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f'this needs {error.name}: pip install "graphcaps[train]"'
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
