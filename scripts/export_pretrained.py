"""Export a finished run as a pretrained net of the library, with its model card.

graphcaps train --preset small --epochs 20 --run-dir runs/mnist-small
python scripts/export_pretrained.py runs/mnist-small graphcaps/nets/pretrained/mnist-small
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import tyro
from tyro.conf import Positional

from graphcaps.demo import IMAGES, gallery_of
from graphcaps.flags import TrainSettings
from graphcaps.nets.model import WEIGHTS, CapsNet
from graphcaps.training import evaluate
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.loop import load_data_of
from graphcaps.training.settings import Recipe

INTRODUCTION = """A CapsNet with {parameters:,} parameters that classifies {subject}: the preset
`{preset}` of graphcaps. The weights are stored in half precision ({megabytes:.1f} MB) and used in
single precision. `gallery.safetensors` contains the first {gallery:,} test images and {mistakes} of
those that the net misclassifies, with their numbers in the test set, for `graphcaps demo {name}`.
"""
LIMITS = """**Limits.** {limits} The best of the {epochs} epochs was selected on the validation set,
not on the test set.
"""
CARD = """# {name}

{introduction}

    model = gc.CapsNet.from_pretrained("{name}")
    output = model(images)    # {images}; poses, lengths, reconstruction

| | |
|---|---|
| accuracy on the {test_images:,} images of the test set | {accuracy:.2%} ({errors} errors), \
these files, evaluated once |
| the same before rounding to half precision | {run_accuracy:.2%} ({run_errors} errors) |
| on the validation set, which selected epoch {best_epoch} of {epochs} | {holdout:.2%} of \
{holdout_images:,} |
| data | {data} |
| loss | margin loss and 0.0005 × the squared errors of the reconstruction (Sabour et al. 2017) |
| recipe | Adam, one cycle up to {rate:g}, batches of {batch_size}, {epochs} epochs, seed {seed} |
| command | `{command}` |
| made with | graphcaps {graphcaps}, torch {torch}, DGL {dgl}, Python {python}; \
{minutes:.0f} minutes of training |

{limits}
"""


@dataclass(frozen=True)
class About:
    """What a card says of a data set, with places for numbers of the training."""

    subject: str
    images: str
    data: str
    limits: str


ABOUT = {
    "mnist": About(
        "the ten digits of MNIST",
        "[B, 1, 28, 28], ink 1 on paper 0",
        "MNIST (LeCun, Cortes, Burges): {train_images:,} training images, shifted by up to "
        "{shift}{mirrored}; no other augmentation",
        "The input is one digit, centred and scaled as in MNIST; `graphcaps predict` normalises "
        "photos in this way. The net was trained only on digits, and a class capsule can be long "
        "for other images: `graphcaps predict` and `graphcaps.nets.judge` report this if the "
        "reconstruction does not resemble the image. Overlapping digits were not in the training "
        "data.",
    ),
    "fashion-mnist": About(
        "the ten kinds of clothing of Fashion-MNIST",
        "[B, 1, 28, 28], clothing light on black 0",
        "Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): {train_images:,} training images, shifted by "
        "up to {shift}{mirrored}; no other augmentation",
        "The input is a picture of one item on a black background, in grey, as in the shop's "
        "catalogue that the data come from; `graphcaps predict` normalises pictures on plain "
        "backgrounds in this way. On photos of clothing as it is worn, expect far less.",
    ),
    "multi-mnist": About(
        "the two overlapping digits of each image of MultiMNIST",
        "[B, 1, 36, 36], ink 1 on paper 0",
        "MultiMNIST (Sabour et al. 2017, section 6), generated from MNIST: {train_images:,} pairs "
        "of digits of different classes, other pairs in each epoch; each digit shifted by up to 4 "
        "pixels; no other augmentation. An answer is correct if both digits are",
        "Every image has to show two digits of different classes, as large as those of MNIST: the "
        "net always names two. The two longest capsules are the prediction.",
    ),
}


@dataclass(frozen=True)
class Options:
    """Round a run's best weights to half precision, test them, and write them with a model card."""

    run: Positional[Path]
    """A finished run's folder."""
    output: Positional[Path]
    """The folder to be written; its name is the net's."""
    gallery: int = IMAGES
    """Number of test images for the demo."""


def command_of(settings: TrainSettings, recipe: Recipe) -> str:
    """The command that trains the net again."""
    words = ["graphcaps train", f"--preset {recipe.preset}"]
    if settings.dataset != TrainSettings.dataset:
        words.append(f"--dataset {settings.dataset}")
    words += [f"--epochs {recipe.epochs}", f"--seed {settings.seed}"]
    if settings.shift is not None:
        words.append(f"--shift {settings.shift}")
    if settings.flip:
        words.append("--flip")
    if settings.amp != TrainSettings.amp:
        words.append(f"--amp {settings.amp}")
    return " ".join(words)


def main() -> None:
    """Write the folder and print the card."""
    options = tyro.cli(Options)
    run = RunFolder(options.run)
    result = run.result()
    if result is None:
        raise SystemExit(f"{options.run} is not finished: it has no result.json")
    started = run.settings()
    settings, recipe = started.settings, started.recipe
    if settings.dataset not in ABOUT:
        raise SystemExit(f"ABOUT has no text for the card of a net trained on {settings.dataset}")
    data = load_data_of(settings)
    CapsNet.load(run.best, image_kind=data.image_kind).save(options.output, torch.float16)
    model = CapsNet.load(options.output)
    score = evaluate(model, data.test)
    gallery = gallery_of(model, data, options.gallery)
    safetensors.torch.save_file(vars(gallery), options.output / "gallery.safetensors")
    about = ABOUT[settings.dataset]
    pixels = data.shift if settings.shift is None else settings.shift
    shift = "1 pixel" if pixels == 1 else f"{pixels} pixels"
    mirrored = ", half of them mirrored" if settings.flip else ""
    words = dict(shift=shift, train_images=len(data.train.labels), mirrored=mirrored)
    facts = dict(
        name=options.output.name,
        parameters=sum(p.numel() for p in model.parameters()),
        preset=recipe.preset,
        subject=about.subject,
        images=about.images,
        data=about.data.format(**words),
        command=command_of(settings, recipe),
        gallery=options.gallery,
        mistakes=int(gallery.mistakes.sum()),
        megabytes=(options.output / WEIGHTS).stat().st_size / 1e6,
        test_images=score.images,
        accuracy=score.accuracy,
        errors=score.errors,
        run_accuracy=result["test_accuracy"],
        run_errors=result["test_errors"],
        best_epoch=result["best_epoch"],
        epochs=recipe.epochs,
        holdout=result["holdout_accuracy"],
        holdout_images=len(data.holdout.labels),
        rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        seed=settings.seed,
        minutes=result["seconds"] / 60,
        **{name: started.versions[name] for name in ("graphcaps", "torch", "dgl", "python")},
    )
    introduction = _filled(INTRODUCTION.format(**facts))
    limits = _filled(LIMITS.format(limits=about.limits, epochs=recipe.epochs))
    card = CARD.format(introduction=introduction, limits=limits, **facts)
    (options.output / "README.md").write_text(card)
    print(card)


def _filled(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


if __name__ == "__main__":
    main()
