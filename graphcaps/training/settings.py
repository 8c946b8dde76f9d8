"""Checks of the settings that a training run starts with, and the recipes of the presets."""

import hashlib
import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from graphcaps.data.datasets import DATASETS
from graphcaps.data.splits import Dataset
from graphcaps.files import record
from graphcaps.flags import Preset, TrainSettings
from graphcaps.nets.model import pretrained_names
from graphcaps.routing import options_of


@record
@dataclass(frozen=True)
class Recipe:
    """How a net is trained: the values of a preset, or those that were set explicitly."""

    preset: Preset
    epochs: int
    batch_size: int  # over all processes
    learning_rate: float
    schedule: Literal["exponential", "one-cycle"]


@record
@dataclass(frozen=True)
class TrainingData:
    """Identifies the data that a run is trained on."""

    images: int  # to train on
    sha256: str  # of images and labels, including the validation set


@record
@dataclass(frozen=True)
class RunSettings:
    """The content of a run's settings.json."""

    settings: TrainSettings
    recipe: Recipe
    versions: dict[str, str]
    data: TrainingData | None = None  # None: a run of graphcaps 0.1.0, which did not record it


RECIPES = {
    "paper": Recipe("paper", 30, 128, 1e-3, "exponential"),
    "small": Recipe("small", 4, 100, 3e-3, "one-cycle"),
    "efficient": Recipe("efficient", 4, 100, 3e-3, "one-cycle"),
    "efficient-multi": Recipe("efficient-multi", 4, 100, 3e-3, "one-cycle"),
    "em-small": Recipe("em-small", 4, 100, 3e-3, "one-cycle"),
    "em": Recipe("em", 4, 100, 3e-3, "one-cycle"),
    "deep": Recipe("deep", 4, 100, 3e-3, "one-cycle"),
    "photo": Recipe("photo", 20, 16, 1e-3, "one-cycle"),
    "cnn": Recipe("cnn", 4, 100, 3e-3, "one-cycle"),
    "cnn-paper": Recipe("cnn-paper", 30, 128, 1e-3, "exponential"),
}
FEWEST_STEPS = 400  # small data sets get more epochs
LIMITS = {
    "epochs": (1, 1_000_000),
    "batch_size": (1, 1_000_000_000),
    "iterations": (1, 1000),
    "shift": (0, 1000),
    "seed": (0, 2**32 - 1),
    "checkpoint_every": (1, 1_000_000_000),
}
LARGEST_IMAGE = 4096  # pixels, height and width
LARGEST_RATE = torch.finfo(torch.float32).max  # the weights' dtype
MAY_CHANGE_ON_RESUME = ("run_dir", "data_dir", "engine", "device", "tensorboard")
OF_ONE_START = ("resume", "cuda_graph")  # not taken from the run


def choose_preset(settings: TrainSettings, device: torch.device) -> tuple[str, str]:
    """Return the preset to train, and why.

    >>> choose_preset(TrainSettings(preset="paper"), torch.device("cpu"))
    ('paper', 'it was asked for')
    """
    if settings.preset != "auto":
        return settings.preset, "it was asked for"
    if device.type == "cuda":
        return "paper", f"there is a CUDA device, {torch.cuda.get_device_name(device)}"
    return "small", f"the paper's net is for CUDA, and this is trained on {device}"


def check_settings(settings: TrainSettings) -> None:
    """Check settings, as far as that is possible without the data.

    Args:
        settings: with absolute paths.

    Raises:
        ValueError: a number out of range, an unknown routing, a path that is not UTF-8.
    """
    if settings.routing is not None:
        options_of(settings.routing)
    _check_numbers(settings, LIMITS)
    image_size_of(settings)
    if settings.until_accuracy is not None and not 0 < settings.until_accuracy <= 1:
        raise ValueError(
            f"until_accuracy must be above 0 and at most 1; got {settings.until_accuracy}"
        )
    _check_rate(settings.learning_rate)
    for name in ("dataset", "data_dir", "run_dir", "start_from"):
        path = str(getattr(settings, name))
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"expected a path in UTF-8 as {name}, because it is written to the run's files; "
                f"got {os.fsencode(path)!r}"
            ) from None


def image_size_of(settings: TrainSettings) -> tuple[int, int] | None:
    """Height and width to which images are scaled, or None.

    Raises:
        ValueError: not one or two numbers, or numbers out of range.

    >>> image_size_of(TrainSettings(image_size=(32,)))
    (32, 32)
    """
    size = settings.image_size
    if size is None:
        return None
    if len(size) not in (1, 2) or not all(1 <= pixels <= LARGEST_IMAGE for pixels in size):
        raise ValueError(
            f"expected an image_size of one number of pixels or two, height and width, from 1 to "
            f"{LARGEST_IMAGE}; got {short_repr(size)}"
        )
    return size[0], size[-1]


def check_started(started: RunSettings) -> None:
    """Check settings that were read from a file.

    Raises:
        ValueError: see `check_settings`.
    """
    _check_numbers(started.recipe, ("epochs", "batch_size"))
    _check_rate(started.recipe.learning_rate)
    check_settings(started.settings)


def make_recipe(settings: TrainSettings, preset: str, images: int) -> Recipe:
    """The recipe of a preset, with the values that were set explicitly.

    Args:
        settings: the settings of the training.
        preset: a name in `RECIPES`.
        images: number of training images.

    Returns:
        The recipe of this run.

    Raises:
        ValueError: a batch larger than the training set.
    """
    recipe = RECIPES[preset]
    batch_size = settings.batch_size
    if batch_size is None:
        batch_size = min(recipe.batch_size, images)
    if batch_size > images:
        raise ValueError(
            f"expected a --batch-size from 1 to the {images} training images; got {batch_size}"
        )
    enough = max(recipe.epochs, math.ceil(FEWEST_STEPS / (images // batch_size)))
    epochs = enough if settings.epochs is None else settings.epochs
    rate = recipe.learning_rate if settings.learning_rate is None else settings.learning_rate
    return replace(recipe, epochs=epochs, batch_size=batch_size, learning_rate=rate)


def given_fields(arguments: Sequence[str]) -> set[str]:
    """The fields of `TrainSettings` whose flags are among a command's arguments.

    >>> sorted(given_fields(["train", "--resume", "--run-dir", "runs/digits", "--seed=0"]))
    ['resume', 'run_dir', 'seed']
    """
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    names = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    names |= {"start_from"} if "from" in names else set()
    return names & {field.name for field in fields(TrainSettings)}


def resume_settings(
    asked: TrainSettings, started: RunSettings, given: Collection[str] | None = None
) -> TrainSettings:
    """The settings of a resumed run: those it was started with, except what may change.

    Args:
        asked: the settings now.
        started: the settings with which the run was started.
        given: the fields of `asked` that were set explicitly; by default those that differ from
            their default.

    Returns:
        The settings to resume with.

    Raises:
        ValueError: a setting that cannot change when a run is resumed.
    """
    if given is None:
        defaults = TrainSettings()
        names = [field.name for field in fields(TrainSettings)]
        given = [name for name in names if getattr(asked, name) != getattr(defaults, name)]
    asked = with_absolute_paths(asked)
    changes = {name: getattr(asked, name) for name in OF_ONE_START}
    for name in given:
        new, old = getattr(asked, name), getattr(started.settings, name)
        if name in MAY_CHANGE_ON_RESUME:
            changes[name] = new
        elif name not in OF_ONE_START and new not in (old, getattr(started.recipe, name, old)):
            raise ValueError(
                f"a run is resumed with the settings it was started with: {name} is {old}, "
                f"not {short_repr(new)}; omit it, or start another run"
            )
    return with_absolute_paths(replace(started.settings, **changes))


def with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """The same settings with absolute paths, valid when the run is resumed from another folder."""
    path = Path(settings.dataset)
    dataset = settings.dataset
    if dataset not in DATASETS and path.exists():
        dataset = str(path.resolve())
    start = settings.start_from
    if start is not None and start not in pretrained_names():
        start = str(Path(start).resolve())
    return replace(
        settings, dataset=dataset, data_dir=settings.data_dir.resolve(), start_from=start
    )


def as_json(started: RunSettings) -> dict[str, Any]:
    """A run's settings as JSON values."""
    values = asdict(started)
    named = values["settings"].items()
    values["settings"] = {
        k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
        for k, v in named
    }
    return values


def describe_data(data: Dataset) -> TrainingData:
    """The number and the hash of the images and labels used in training."""
    digest = hashlib.sha256()
    for tensor in (*data.train, *data.holdout):
        digest.update(f"{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return TrainingData(len(data.train.labels), digest.hexdigest())


def check_data(data: Dataset, started: RunSettings) -> None:
    """Check that these are the data that a run was started with.

    Raises:
        ValueError: they differ.
    """
    now = describe_data(data)
    if started.data not in (None, now):
        raise ValueError(
            f"expected the data that the run was started with: {started.data.images:,} training "
            f"images with SHA-256 {started.data.sha256[:12]}…; {data.name} has {now.images:,} "
            f"with {now.sha256[:12]}…. Restore that data, or start another run"
        )


def make_schedule(
    optimizer: Optimizer, recipe: Recipe, steps_per_epoch: int, step: int = 0
) -> LRScheduler:
    """The schedule of the learning rate.

    Args:
        optimizer: its learning rate is set.
        recipe: names the schedule and its length.
        steps_per_epoch: number of steps.
        step: number of steps taken before, by an optimizer with the same schedule.

    Returns:
        `exponential`: times 0.96 every 2000 steps, continuously, as in the authors' code.
        `one-cycle`: up to the learning rate, then down to almost 0 (Smith 2018).
    """
    if recipe.schedule == "one-cycle":
        steps = recipe.epochs * steps_per_epoch
        return OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=steps + 1, last_epoch=step - 1
        )
    return LambdaLR(optimizer, lambda step: 0.96 ** (step / 2000), last_epoch=step - 1)


def _check_numbers(values: TrainSettings | Recipe, names: Iterable[str]) -> None:
    for name in names:
        number = getattr(values, name)
        least, most = LIMITS[name]
        if number is not None and number < least:
            raise ValueError(f"{name} must be at least {least}; got {short_repr(number)}")
        if number is not None and number > most:
            raise ValueError(f"{name} must be at most {most}; got {short_repr(number)}")


def _check_rate(rate: float | None) -> None:
    if rate is not None and not 0 < rate <= LARGEST_RATE:
        raise ValueError(
            f"the learning rate must be above 0 and at most {LARGEST_RATE:.2g}; got {rate}"
        )
