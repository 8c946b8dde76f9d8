"""The commands of the program."""

import os
import platform
import shlex
import sys
from functools import partial
from reprlib import repr as short_repr

import torch
from torch import Tensor

from graphcaps import __version__, engines
from graphcaps._dgl import dgl, has_cuda
from graphcaps.data.datasets import DATASETS, FETCHED, load_dataset
from graphcaps.data.images import read_image
from graphcaps.data.splits import Dataset
from graphcaps.demo import check_routed, gallery_of, shipped_gallery, write_demo
from graphcaps.explorer import check_writable
from graphcaps.flags import (
    CompareSettings,
    DemoSettings,
    EvaluateSettings,
    InfoSettings,
    PredictSettings,
    ReportSettings,
    Settings,
    TrainSettings,
)
from graphcaps.functional import multi_hot
from graphcaps.nets.model import (
    PRETRAINED,
    CapsNet,
    CapsNetOutput,
    find_net,
    pretrained_names,
)
from graphcaps.nets.verdict import has_verdict, judge_images
from graphcaps.streams import tell
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.evaluation import as_input, check_lengths, evaluate, fitted
from graphcaps.training.loop import TrainingInterrupt, train
from graphcaps.training.settings import given_fields, image_size_of
from graphcaps.training.workers import joined_workers, leads


def run(settings: Settings) -> None:
    """Run the command with these settings."""
    try:
        _run(settings)
    except TrainingInterrupt as interrupt:
        folder = shlex.quote(str(interrupt.run))
        again = interrupt.again or f"{_program()} train --run-dir {folder} --resume"
        raise KeyboardInterrupt(f"{interrupt}\nGo on with: {again}") from None


def _run(settings: Settings) -> None:
    match settings:
        case TrainSettings():
            _train(settings)
        case EvaluateSettings():
            _evaluate(settings)
        case PredictSettings():
            _predict(settings)
        case ReportSettings():
            _report(settings)
        case DemoSettings():
            _demo(settings)
        case CompareSettings():
            _compare(settings)
        case InfoSettings():
            _info()


def _train(settings: TrainSettings) -> None:
    result = train(settings, given_fields(sys.argv))
    if not leads():
        return
    tell(
        f"Test accuracy {result['test_accuracy']:.2%} "
        f"({result['test_errors']} errors in {result['test_images']:,} images of "
        f"{result['dataset']}), weights of epoch {result['best_epoch']}, the best on the "
        f"validation set; {result['seconds']:.0f} s of training.\n"
        f"The run's files are in {result['run']}"
    )


def _evaluate(settings: EvaluateSettings) -> None:
    model = CapsNet.load(find_net(settings.run_dir), engine=settings.engine)
    with joined_workers(settings.device) as workers:
        data = fitted(_load_data(settings, model), model)
        score = evaluate(model.to(workers.device), data.test)
    tell(
        f"Test accuracy {score.accuracy:.2%} "
        f"({score.errors} errors in {score.images:,} images of {data.name}), loss {score.loss:.4f}"
    )


@torch.no_grad()
def _predict(settings: PredictSettings) -> None:
    if not settings.images:
        raise ValueError("expected at least one image file; see graphcaps predict --help")
    model = CapsNet.load(find_net(settings.run_dir), engine=settings.engine).eval()
    for path in settings.images:
        image = read_image(path, model.config.image_shape, model.config.image_kind)
        images = as_input(image.unsqueeze(0), model)
        output = model(images)
        check_lengths(output.lengths)
        tell(f"{path}: {_classes_in_words(model, output, images)}")
        (lengths,) = output.lengths.tolist()
        named = zip(model.config.names, lengths, strict=True)
        tell("  " + "  ".join(f"{name}: {x:.2f}" for name, x in named))


def _classes_in_words(model: CapsNet, output: CapsNetOutput, images: Tensor) -> str:
    """The prediction for one image, in words."""
    names = model.config.names
    if has_verdict(model.config):
        (verdict,) = judge_images(model, output, images)
        return verdict.text(names)
    (found,) = multi_hot(model.classify(output.lengths), 1, len(names))
    return " + ".join(names[k] for k in found.nonzero().flatten()) or "none"


def _report(settings: ReportSettings) -> None:
    # with matplotlib, which the other commands do not need
    from graphcaps.report import write_report

    run = RunFolder(settings.run_dir)
    run.settings()  # first, to report a folder that is not a run
    output = settings.output or settings.run_dir / "report.html"
    check_writable(output)  # before the work, not after it
    model = CapsNet.load(find_net(settings.run_dir), engine=settings.engine)
    with joined_workers(settings.device) as workers:
        data = _load_data(settings, model)
        write_report(run, model.to(workers.device), data, output)
    if run.result() is None:
        tell("The run is not finished: the report shows its best epoch so far, and says so.")
    tell(f"The report is in {output}; open it in a browser")


def _demo(settings: DemoSettings) -> None:
    check_writable(settings.output)  # before the work, not after it
    folder = find_net(settings.run_dir)
    model, name = CapsNet.load(folder), settings.run_dir.resolve().name
    check_routed(model)
    ships = folder.parent == PRETRAINED
    if ships:
        if settings.dataset is not None or settings.data_dir is not None:
            raise ValueError(
                "a net that ships with graphcaps has its own images: name a run, or omit "
                "--dataset and --data-dir"
            )
        classes, gallery = model.config.names, shipped_gallery(name)
    else:
        data = fitted(_load_data(settings, model), model)
        classes, gallery = data.classes, gallery_of(model, data)
    write_demo(model, classes, gallery, settings.output, name)
    tell(f"The demo is in {settings.output}; open it in a browser")
    others = [other for other in pretrained_names() if other != name]
    if ships and others:
        tell(f"graphcaps demo NAME shows another net: {', '.join(others)}")


def _compare(settings: CompareSettings) -> None:
    from graphcaps.compare import compare

    asked = TrainSettings(
        data_dir=settings.data_dir, engine=settings.engine, device=settings.device
    )
    compare(settings.table, asked, settings.runs_dir)


def _info() -> None:
    tell(
        f"graphcaps {__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, DGL {dgl.__version__} "
        f"({'with' if has_cuda() else 'without'} CUDA)"
    )
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        tell(f"{device} ({name}): engine auto is {engines.choose('auto', device)}")
        for engine in engines.ENGINES:
            tell(f"  {engine:8} {engines.why_not(engine, device) or 'can run'}")
    if not torch.cuda.is_available():
        tell("no CUDA device")


def _load_data(
    settings: EvaluateSettings | ReportSettings | DemoSettings, model: CapsNet
) -> Dataset:
    """Load the data set of --dataset, or that of the run, with the classes of the net."""
    run, data_dir = settings.run_dir, settings.data_dir
    assert run is not None
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
        raise ValueError(f"{run} does not record its data set: add --dataset")
    dataset, of_run = started.dataset, started.data_dir
    if dataset not in DATASETS and not os.path.exists(dataset):
        raise ValueError(
            f"{run} was trained on {short_repr(dataset)}, which is not here: "
            "name the folder where it is with --dataset"
        )
    if data_dir is None and dataset in FETCHED and not of_run.is_dir():
        raise ValueError(
            f"{run} had its data in {of_run}, which is not here: add --data-dir FOLDER, where "
            f"{dataset} is, or is to be downloaded"
        )
    return load(dataset, data_dir or of_run)


def _program() -> str:
    """The command with which this program was started, for hints that can be pasted."""
    called = sys.argv[0]
    return "python -m graphcaps" if called.endswith("__main__.py") else called
