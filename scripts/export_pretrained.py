"""Export a finished run as a pretrained net of the library, with its model card.

graphcaps train --preset small --epochs 20 --run-dir runs/mnist-small
python scripts/export_pretrained.py runs/mnist-small graphcaps/nets/pretrained/mnist-small
"""

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import tyro
from tyro.conf import Positional

from graphcaps.demo import gallery_of
from graphcaps.nets.model import WEIGHTS, CapsNet
from graphcaps.training import evaluate
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.loop import load_data_of

CARD = """# {name}

A CapsNet with {parameters:,} parameters that classifies the ten digits of MNIST: the preset
`{preset}` of graphcaps. The weights are stored in half precision ({megabytes:.1f} MB) and used in
single precision. `mistakes.safetensors` contains the test images that it misclassifies (`images`,
uint8, and `labels`), `gallery.safetensors` the first thousand test images and these, with their
numbers in the test set, for `graphcaps demo`.

    model = gc.CapsNet.from_pretrained("{name}")
    output = model(images)    # [B, 1, 28, 28], ink 1 on paper 0; poses, lengths, reconstruction

| | |
|---|---|
| accuracy on the {test_images:,} images of MNIST's test set | {accuracy:.2%} ({errors} errors), \
these files, evaluated once |
| the same before rounding to half precision | {run_accuracy:.2%} ({run_errors} errors) |
| on the validation set, which selected epoch {best_epoch} of {epochs} | {holdout:.2%} of \
{holdout_images:,} |
| data | MNIST (LeCun, Cortes, Burges): {train_images:,} training images, shifted by up to {shift} \
pixels; no other augmentation |
| loss | margin loss and 0.0005 × the squared errors of the reconstruction (Sabour et al. 2017) |
| recipe | Adam, one cycle up to {rate:g}, batches of {batch_size}, {epochs} epochs, seed {seed} |
| command | `graphcaps train --preset {preset} --epochs {epochs} --seed {seed}` |
| made with | graphcaps {graphcaps}, torch {torch}, DGL {dgl}, Python {python}; \
{minutes:.0f} minutes of training |

**Limits.** The input is one digit, centred and scaled as in MNIST; `graphcaps predict` normalises
photos in this way. The net was trained only on digits, and a class capsule can be long for other
images: `graphcaps predict` and `graphcaps.nets.judge` report this if the reconstruction does not
resemble the image. Overlapping digits were not in the training data. The best of the {epochs}
epochs was selected on the validation set, not on the test set.
"""


@dataclass(frozen=True)
class Options:
    """Round a run's best weights to half precision, test them, and write them with a model card."""

    run: Positional[Path]
    """A finished run's folder."""
    output: Positional[Path]
    """The folder to be written; its name is the net's."""


def main() -> None:
    """Write the folder and print the card."""
    options = tyro.cli(Options)
    run = RunFolder(options.run)
    result = run.result()
    if result is None:
        raise SystemExit(f"{options.run} is not finished: it has no result.json")
    started = run.settings()
    settings, recipe = started.settings, started.recipe
    CapsNet.load(run.best).save(options.output, torch.float16)
    model = CapsNet.load(options.output)
    data = load_data_of(settings)
    score = evaluate(model, data.test)
    wrong = score.wrong
    mistakes = {"images": data.test.images[wrong], "labels": data.test.labels[wrong]}
    safetensors.torch.save_file(mistakes, options.output / "mistakes.safetensors")
    gallery = gallery_of(model, data)
    safetensors.torch.save_file(vars(gallery), options.output / "gallery.safetensors")
    card = CARD.format(
        name=options.output.name,
        parameters=sum(p.numel() for p in model.parameters()),
        preset=recipe.preset,
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
        train_images=len(data.train.labels),
        shift=data.shift if settings.shift is None else settings.shift,
        rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        seed=settings.seed,
        minutes=result["seconds"] / 60,
        **{name: started.versions[name] for name in ("graphcaps", "torch", "dgl", "python")},
    )
    (options.output / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
