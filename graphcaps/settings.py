"""What a person asks of a training enters, every number of its recipe leaves."""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from graphcaps.data import DATASETS

Engine = Literal["auto", "fused", "udf", "builtin", "scatter"]


@dataclass(frozen=True)
class TrainSettings:
    """Train a CapsNet, test it once, and keep everything in a run's folder."""

    preset: Literal["auto", "paper", "small"] = "auto"
    """The net and its recipe: the paper's, or a small one for a CPU. auto: paper where there is
    a CUDA device, small elsewhere."""
    dataset: str = "mnist"
    """mnist, fashion-mnist, mnist-5k (5,000 digits that need no download), or a folder with four
    IDX files of your own."""
    data_dir: Path = Path("data")
    """Where data sets are kept."""
    run_dir: Path | None = None
    """The run's folder. Default: runs/DATASET-PRESET-DATE-TIME."""
    resume: bool = False
    """Go on with the run in --run-dir from its last checkpoint, with the settings it was started
    with; data-dir, engine, device and tensorboard may be given anew, cuda-graph must be."""
    epochs: int | None = None
    """Passes over the training images. Default: the preset's (paper 30, small 4), and no fewer
    than 400 steps."""
    batch_size: int | None = None
    """Images per step, over all processes. Default: the preset's (paper 128, small 100), or all
    images if these are fewer."""
    learning_rate: float | None = None
    """Adam's; the largest one where it goes up and down. Default: the preset's (paper 0.001,
    times 0.96 every 2000 steps; small 0.003, one cycle)."""
    routing: Literal["dynamic", "uniform"] = "dynamic"
    """Routing by agreement, or the control without routing."""
    iterations: int = 3
    """Of dynamic routing."""
    shift: int = 2
    """Training images are moved by up to this many pixels."""
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
    checkpoint_every: int = 200
    """Steps between checkpoints, besides the one after every epoch."""
    tensorboard: bool = False
    """Write TensorBoard's files too, into the run's folder."""


@dataclass(frozen=True)
class Recipe:
    """How a preset's net is trained: numbers that were asked for, or the preset's own."""

    preset: str
    epochs: int
    batch_size: int  # over all processes
    learning_rate: float
    schedule: Literal["exponential", "one-cycle"]


RECIPES = {
    "paper": Recipe("paper", 30, 128, 1e-3, "exponential"),
    "small": Recipe("small", 4, 100, 3e-3, "one-cycle"),
}
LARGEST_SEED = 2**32 - 1
FEWEST_STEPS = 400  # a small data set is passed over more often
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


def make_recipe(settings: TrainSettings, preset: str, images: int) -> Recipe:
    """The preset's recipe with what was asked for in its place.

    Args:
        settings: what was asked for.
        preset: a name in `RECIPES`.
        images: number of training images.

    Returns:
        The recipe of this training.

    Raises:
        ValueError: numbers that no training can have.
    """
    recipe = RECIPES[preset]
    batch_size = settings.batch_size
    if batch_size is None:
        batch_size = min(recipe.batch_size, images)
    if not 1 <= batch_size <= images:
        raise ValueError(
            f"expected a --batch-size from 1 to the {images} training images; got {batch_size}"
        )
    enough = max(recipe.epochs, math.ceil(FEWEST_STEPS / (images // batch_size)))
    epochs = enough if settings.epochs is None else settings.epochs
    rate = recipe.learning_rate if settings.learning_rate is None else settings.learning_rate
    for name, number, least in (
        ("epochs", epochs, 1),
        ("seed", settings.seed, 0),
        ("iterations", settings.iterations, 1),
        ("shift", settings.shift, 0),
        ("checkpoint_every", settings.checkpoint_every, 1),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}; got {number}")
    if settings.seed > LARGEST_SEED:
        raise ValueError(f"the seed must be at most {LARGEST_SEED}; got {settings.seed}")
    if not 0 < rate < math.inf:
        raise ValueError(f"the learning rate must be above 0; got {rate}")
    return replace(recipe, epochs=epochs, batch_size=batch_size, learning_rate=rate)


def resume_settings(asked: TrainSettings, stored: dict[str, Any]) -> tuple[TrainSettings, Recipe]:
    """What a run was started with, and what may change from one start to the next.

    Args:
        asked: what is asked for now.
        stored: what the run's settings.json holds.

    Returns:
        The settings to go on with, and the run's recipe.

    Raises:
        ValueError: something is asked for that a run cannot change, or `stored` is foreign.
    """
    try:
        values = stored["settings"]
        started = TrainSettings(**{**values, "data_dir": Path(values["data_dir"])})
        recipe = Recipe(**stored["recipe"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"the run's settings are not those of graphcaps: {error}") from None
    if asked.dataset != TrainSettings.dataset:
        asked = replace(asked, dataset=with_absolute_paths(asked).dataset)
    changes = {}
    for field in fields(TrainSettings):
        new, old = getattr(asked, field.name), getattr(started, field.name)
        if field.name in OF_ONE_START:
            changes[field.name] = new
        elif field.name in MAY_CHANGE_ON_RESUME:
            changes[field.name] = old if new == field.default else new
        elif new not in (field.default, old):
            raise ValueError(
                f"a run goes on with the settings it was started with: {field.name} is {old}, "
                f"not {new}; leave it out, or start another run"
            )
    return with_absolute_paths(replace(started, **changes)), recipe


def with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """The same settings, still right when the run is resumed from another folder."""
    folder = Path(settings.dataset)
    dataset = settings.dataset
    if dataset not in DATASETS and folder.is_dir():
        dataset = str(folder.resolve())
    return replace(settings, dataset=dataset, data_dir=settings.data_dir.resolve())


def as_json(settings: TrainSettings) -> dict[str, Any]:
    """The settings as values that JSON has."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}


def make_schedule(optimizer: Optimizer, recipe: Recipe, steps_per_epoch: int) -> LRScheduler:
    """The learning rate from step to step.

    Args:
        optimizer: whose rate is set.
        recipe: which schedule, and for how long.
        steps_per_epoch: number of steps.

    Returns:
        `exponential`: times 0.96 every 2000 steps, continuously, as in the authors' code.
        `one-cycle`: up to the learning rate and down to nothing (Smith 2018).
    """
    if recipe.schedule == "one-cycle":
        steps = recipe.epochs * steps_per_epoch
        return OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps + 1)
    return LambdaLR(optimizer, lambda step: 0.96 ** (step / 2000))
