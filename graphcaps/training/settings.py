"""Settings of a training: the flags of `graphcaps train`, and the recipes of the presets."""

import hashlib
import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from reprlib import repr as short_repr
from typing import Annotated, Any, Literal

import torch
import tyro
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from graphcaps.data.datasets import DATASETS
from graphcaps.data.splits import Dataset
from graphcaps.files import record
from graphcaps.nets.model import pretrained_names
from graphcaps.routing import options_of

Preset = Literal[
    "paper", "small", "efficient", "em-small", "em", "deep", "photo", "cnn", "cnn-paper"
]
Engine = Literal["auto", "fused", "udf", "builtin", "scatter"]


@record
@dataclass(frozen=True)
class TrainSettings:
    """Train a CapsNet, test it once, and keep everything in a run's folder."""

    preset: Literal["auto"] | Preset = "auto"
    """The net and its recipe: the paper's, or a small one for a CPU; efficient, em-small, em: those
    of other papers; deep: three layers of routed capsules; photo: for pictures of 224 pixels; cnn,
    cnn-paper: controls without capsules. auto: paper where there is a CUDA device, small
    elsewhere."""
    dataset: str = "mnist"
    """mnist, fashion-mnist, kmnist, cifar10, svhn, mnist-5k (5,000 digits that need no download);
    made from MNIST: multi-mnist (two digits in an image), affine-mnist (tested on digits that are
    turned, sheared and scaled), rotated-mnist; or your own: a folder of image files by class
    (train/CLASS/ and test/CLASS/, or CLASS/), an .npz file, or a folder with the files of
    smallNORB, affNIST or with four IDX files."""
    image_size: tuple[int, ...] | None = None
    """Height and width in pixels that all images are scaled to, or one number for both. Default:
    their own, if all have one."""
    data_dir: Path = Path("data")
    """Where data sets are kept."""
    run_dir: Path | None = None
    """The run's folder. Default: runs/DATASET-PRESET-DATE-TIME."""
    resume: bool = False
    """Go on with the run in --run-dir from its last checkpoint, on the same images, with the
    settings it was started with; data-dir, engine, device and tensorboard may be given anew,
    cuda-graph must be."""
    start_from: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Train a net further: a run's folder, a folder with model.safetensors, or the name of a net
    that comes with graphcaps, such as mnist-small. Images are scaled to its size and channels; for
    other classes it gets new class capsules. The preset then is the recipe alone."""
    epochs: int | None = None
    """Passes over the training images. Default: the preset's (paper 30, small 4), and no fewer
    than 400 steps."""
    batch_size: int | None = None
    """Images per step, over all processes. Default: the preset's (paper 128, small 100), or all
    images if these are fewer."""
    learning_rate: float | None = None
    """Adam's; the largest one where it goes up and down. Default: the preset's (paper 0.001,
    times 0.96 every 2000 steps; small 0.003, one cycle)."""
    routing: str | None = None
    """dynamic, em, attention, self_attention, self_routing, variational_bayes, or uniform, the
    control without routing. Default: the net's (paper and small: dynamic)."""
    iterations: int | None = None
    """Of a routing that has iterations. Default: the net's (paper and small: 3)."""
    shift: int | None = None
    """Training images are moved by up to this many pixels. Default: 2, and 0 for data sets that are
    made."""
    engine: Engine = "auto"
    """How messages are passed; changes speed, not results. See graphcaps info."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    amp: Literal["off", "bf16"] = "off"
    """bf16: convolutions and decoder in bfloat16; votes and routing stay in float32."""
    cuda_graph: bool = False
    """Record what a step computes up to its gradients, and replay it, launched at once: for one
    GPU, with engine fused. Changes speed, not results; not yet seen on a device."""
    seed: int = 0
    """Of the weights, the order of the images and their shifts."""
    until_accuracy: float | None = None
    """Stop after the first epoch with this accuracy on the hold-out, or a higher one, 0 to 1."""
    checkpoint_every: int = 200
    """Steps between checkpoints, besides the one after every epoch."""
    tensorboard: bool = False
    """Write TensorBoard's files too, into the run's folder."""


@record
@dataclass(frozen=True)
class Recipe:
    """How a preset's net is trained: numbers that were asked for, or the preset's own."""

    preset: Preset
    epochs: int
    batch_size: int  # over all processes
    learning_rate: float
    schedule: Literal["exponential", "one-cycle"]


@record
@dataclass(frozen=True)
class TrainingData:
    """What tells the data that a run is trained on from other data."""

    images: int  # to train on
    sha256: str  # of images and labels, those of the hold-out included


@record
@dataclass(frozen=True)
class RunSettings:
    """What a run is started with, the content of its settings.json."""

    settings: TrainSettings
    recipe: Recipe
    versions: dict[str, str]
    data: TrainingData | None = None  # None: a run of graphcaps 0.1.0, which did not look


RECIPES = {
    "paper": Recipe("paper", 30, 128, 1e-3, "exponential"),
    "small": Recipe("small", 4, 100, 3e-3, "one-cycle"),
    "efficient": Recipe("efficient", 4, 100, 3e-3, "one-cycle"),
    "em-small": Recipe("em-small", 4, 100, 3e-3, "one-cycle"),
    "em": Recipe("em", 4, 100, 3e-3, "one-cycle"),
    "deep": Recipe("deep", 4, 100, 3e-3, "one-cycle"),
    "photo": Recipe("photo", 20, 16, 1e-3, "one-cycle"),
    "cnn": Recipe("cnn", 4, 100, 3e-3, "one-cycle"),
    "cnn-paper": Recipe("cnn-paper", 30, 128, 1e-3, "exponential"),
}
FEWEST_STEPS = 400  # a small data set is passed over more often
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
OF_ONE_START = ("resume", "cuda_graph")  # a run does not remember them


def choose_preset(settings: TrainSettings, device: torch.device) -> tuple[str, str]:
    """The preset that is trained, and why.

    >>> choose_preset(TrainSettings(preset="paper"), torch.device("cpu"))
    ('paper', 'it was asked for')
    """
    if settings.preset != "auto":
        return settings.preset, "it was asked for"
    if device.type == "cuda":
        return "paper", f"there is a CUDA device, {torch.cuda.get_device_name(device)}"
    return "small", f"the paper's net is for CUDA, and this is trained on {device}"


def check_settings(settings: TrainSettings) -> None:
    """See whether a training can have such settings, whatever its data.

    Args:
        settings: with absolute paths.

    Raises:
        ValueError: a number out of its limits, an unknown routing, a name that is not UTF-8.
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
                f"expected a name in UTF-8 as {name}, for the run's files hold it; "
                f"got {os.fsencode(path)!r}"
            ) from None


def image_size_of(settings: TrainSettings) -> tuple[int, int] | None:
    """Height and width that images are scaled to, if that is asked for.

    Raises:
        ValueError: other than one or two numbers, or numbers out of their limits.

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
    """See whether a training can go on with settings that were read from a file.

    Raises:
        ValueError: as `check_settings`.
    """
    _check_numbers(started.recipe, ("epochs", "batch_size"))
    _check_rate(started.recipe.learning_rate)
    check_settings(started.settings)


def make_recipe(settings: TrainSettings, preset: str, images: int) -> Recipe:
    """The preset's recipe with what was asked for in its place.

    Args:
        settings: what was asked for.
        preset: a name in `RECIPES`.
        images: number of training images.

    Returns:
        The recipe of this training.

    Raises:
        ValueError: a batch of more images than there are.
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
    """What a run was started with, and what may change from one start to the next.

    Args:
        asked: what is asked for now.
        started: what the run was started with.
        given: the fields of `asked` that count; those that differ from their default, if None.

    Returns:
        The settings to go on with.

    Raises:
        ValueError: something is asked for that a run cannot change.
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
                f"a run goes on with the settings it was started with: {name} is {old}, "
                f"not {short_repr(new)}; leave it out, or start another run"
            )
    return with_absolute_paths(replace(started.settings, **changes))


def with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """The same settings, still right when the run is resumed from another folder."""
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
    """What a run is started with, as values that JSON has."""
    values = asdict(started)
    named = values["settings"].items()
    values["settings"] = {
        k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
        for k, v in named
    }
    return values


def describe_data(data: Dataset) -> TrainingData:
    """The number and the hash of the images and labels that a training sees."""
    digest = hashlib.sha256()
    for tensor in (*data.train, *data.holdout):
        digest.update(f"{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return TrainingData(len(data.train.labels), digest.hexdigest())


def check_data(data: Dataset, started: RunSettings) -> None:
    """See whether these are the data that a run was started with.

    Raises:
        ValueError: they are others.
    """
    now = describe_data(data)
    if started.data not in (None, now):
        raise ValueError(
            f"expected the data that the run was started with, {started.data.images:,} training "
            f"images with SHA-256 {started.data.sha256[:12]}…; {data.name} has {now.images:,} "
            f"with {now.sha256[:12]}…. Put those in their place, or start another run"
        )


def make_schedule(
    optimizer: Optimizer, recipe: Recipe, steps_per_epoch: int, step: int = 0
) -> LRScheduler:
    """The learning rate from step to step.

    Args:
        optimizer: whose rate is set.
        recipe: which schedule, and for how long.
        steps_per_epoch: number of steps.
        step: how many were taken. If any, the optimizer has had such a schedule before.

    Returns:
        `exponential`: times 0.96 every 2000 steps, continuously, as in the authors' code.
        `one-cycle`: up to the learning rate and down to nothing (Smith 2018).
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
