"""Runs for the tests of the report, with untrained nets whose coupling is far from equal."""

import dataclasses

import torch
from run_records import epoch_metrics, result

import graphcaps as gc
from graphcaps.data.splits import Dataset, Split
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.settings import RECIPES, RunSettings, TrainSettings


def lively_model(**changes):
    """A small net with large weights: coupling far from equal, pictures with contrast."""
    torch.manual_seed(1)
    model = gc.CapsNet(gc.CapsNetConfig(**(dict(conv_channels=6, capsule_maps=3) | changes)))
    with torch.no_grad():
        model.primary.conv.weight.mul_(6)
        model.capsules.weight.mul_(12)
        routing = model.capsules.routing
        for learned in routing.parameters():  # many of these start at 0
            learned.add_(0.3 * torch.randn_like(learned))
        if routing.vote_columns:
            model.capsules.weight[..., -1].normal_()
        if model.decoder is not None:
            for layer in model.decoder.layers[::2]:
                layer.weight.mul_(6)
    return model.eval().requires_grad_(False)


def random_data(model, images=40, classes=None):
    """Random images of the net's size; of three labels, two are the net's predictions."""
    config = model.config
    shape = (images, *config.image_shape)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    with torch.no_grad():
        labels = model.classify(model(pixels / 255).lengths)
    if labels.dim() == 1:
        labels[::3] = torch.randint(0, config.classes, labels[::3].shape)
    else:
        labels[::3] = labels[::3].roll(1, dims=1)
    split = Split(pixels, labels)
    names = classes or tuple(map(str, range(config.classes)))
    return Dataset("random", names, split, split, split)


def write_run(folder, model, *, dataset="random", finished=True, errors=13):
    """The folder of a run, as training leaves it."""
    run = RunFolder(folder)
    settings = TrainSettings(preset="small", dataset=str(dataset))
    run.path.mkdir(parents=True, exist_ok=True)
    run.create(
        RunSettings(
            settings, dataclasses.replace(RECIPES["small"], epochs=2), {"graphcaps": "0.1.0"}
        )
    )
    for epoch, accuracy in ((1, 0.5), (2, 0.4)):
        run.log(
            epoch_metrics(
                epoch,
                train_loss=0.3 / epoch,
                train_accuracy=accuracy,
                holdout_accuracy=accuracy,
            )
        )
    model.save(run.best)
    if finished:
        run.finish(result(errors=errors))
    return run


HOSTILE = (
    '<img src=x onerror="window.attacked = true">\'</script></title></style>'
    "<script>window.attacked = true</script>&amp;"
)


def filled_with(text, records, finished):
    """The records with every string, and every number that is only shown, replaced by `text`."""
    config = dataclasses.replace(records.config)
    object.__setattr__(config, "routing", text)  # which a configuration itself would refuse
    parts = {text: {text: text, "list": [text]}, "recipe": {"epochs": text}}
    return dataclasses.replace(
        records,
        name=text,
        data=text,
        classes=(text,) * 10,
        config=config,
        settings=parts,
        metrics=[{**records.metrics[0], "epoch": text}],
        result={text: text} if finished else None,
    )
