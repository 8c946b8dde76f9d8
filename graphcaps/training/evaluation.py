"""Evaluation of a model on labelled images."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphcaps.data.splits import Dataset, Split
from graphcaps.functional import all_right, multi_hot, predicted_classes
from graphcaps.layers import NonFinitePosesError
from graphcaps.nets.losses import capsnet_loss
from graphcaps.nets.model import CapsNet


@dataclass(frozen=True)
class Score:
    """How a model does on a set of images."""

    lengths: Tensor  # of all class capsules, [N, J], on the CPU
    labels: Tensor  # [N], or 0 and 1 in [N, J], on the CPU
    loss: float  # averaged over the images
    labels_per_image: int = 1  # see `predicted_classes`

    @property
    def predicted(self) -> Tensor:
        """The predicted classes, like `labels`."""
        return predicted_classes(self.lengths, self.labels_per_image)

    @property
    def wrong(self) -> Tensor:
        """Whether the predicted classes of an image are not exactly the right ones, `[N]`."""
        return ~all_right(self.predicted, self.labels)

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.labels)

    @property
    def errors(self) -> int:
        """How many have predicted classes that are not exactly the right ones."""
        return int(self.wrong.sum())

    def confusion(self) -> Tensor:
        """How many images of each true class (row) are read as each class (column), `[J, J]`.

        With several classes in an image, each that is missed counts once for each that is
        predicted and not there.
        """
        true, read = (
            multi_hot(labels, *self.lengths.shape).double()
            for labels in (self.labels, self.predicted)
        )
        both = true * read
        return ((true - both).T @ (read - both) + both.sum(dim=0).diag()).long()

    @property
    def accuracy(self) -> float:
        """The share of images whose predicted classes are exactly the right ones, 0 to 1."""
        return 1 - self.errors / self.images


def as_input(images: Tensor, model: CapsNet) -> Tensor:
    """Pixels as the model takes them.

    Args:
        images: uint8 `[B, C, H, W]`, on any device.
        model: its weights tell device and dtype.

    Returns:
        The same from 0 to 1, where the model is.
    """
    weight = next(model.parameters())
    return images.to(weight.device).to(weight.dtype) / 255


@torch.no_grad()
def evaluate(model: CapsNet, split: Split, *, batch_size: int = 200) -> Score:
    """Classify every image by its longest capsules, and draw those for the loss.

    Args:
        model: evaluated in evaluation mode, left in the mode it was in.
        split: the images and their labels.
        batch_size: how many at a time.

    Returns:
        The score over all of them.

    Raises:
        ValueError: no images.
        NonFinitePosesError: poses, or lengths of class capsules, that are not finite.
    """
    if not len(split.labels):
        raise ValueError("expected at least one image to evaluate on; got none")
    was_training = model.training
    model.eval()
    lengths, loss = [], 0.0
    for images, labels in zip(
        split.images.split(batch_size), split.labels.split(batch_size), strict=True
    ):
        images = as_input(images, model)
        labels = labels.to(images.device)
        output = model(images)
        lengths.append(output.lengths)
        loss += float(capsnet_loss(output, images, labels, kind=model.loss)) * len(labels)
    model.train(was_training)
    found = torch.cat(lengths).cpu()
    check_lengths(found)
    per_image = model.config.labels_per_image
    return Score(found, split.labels.cpu(), loss / len(split.labels), per_image)


def fitted(data: Dataset, model: CapsNet) -> Dataset:
    """A data set as a model can be evaluated on it: with the model's classes.

    Where the model has names of classes, the labels become the numbers that these names have
    there, so that data may lack some of them.

    Raises:
        ValueError: the test images are of another size, or of classes that the model lacks.
    """
    config = model.config
    here = list(config.image_shape)
    there = list(data.test.images.shape[1:])
    if here != there:
        raise ValueError(
            f"the net takes images of shape {here}, {data.name} has images of shape {there}: "
            "name the data set it was trained on with --dataset"
        )
    if len(data.classes) > config.classes:
        raise ValueError(
            f"the net tells {config.classes} classes and {data.name} has {len(data.classes)}: "
            "name the data set it was trained on with --dataset"
        )
    if data.labels_per_image != config.labels_per_image:
        raise ValueError(
            f"the net tells {_many(config.labels_per_image)} in an image, and the images of "
            f"{data.name} show {_many(data.labels_per_image)}: name the data set it was trained on "
            "with --dataset"
        )
    names = config.class_names
    if names is None or names == data.classes:
        return data
    unknown = [name for name in data.classes if name not in names]
    if unknown or data.labels_per_image != 1:
        unknown = unknown or list(data.classes)
        raise ValueError(
            f"the net does not know these classes of {data.name}: {', '.join(unknown)}; it knows "
            f"{', '.join(names)}. Name the data set it was trained on with --dataset"
        )
    numbers = torch.tensor([names.index(name) for name in data.classes])
    train, holdout, test = (
        split._replace(labels=numbers[split.labels])
        for split in (data.train, data.holdout, data.test)
    )
    return replace(data, classes=names, train=train, holdout=holdout, test=test)


def _many(classes: int) -> str:
    return {0: "any number of classes", 1: "1 class"}.get(classes, f"{classes} classes")


def check_lengths(lengths: Tensor) -> None:
    """Raise NonFinitePosesError where a class capsule has no length that could be compared.

    Args:
        lengths: of all class capsules of some images, `[N, J]`.
    """
    bad = int((~lengths.isfinite()).any(dim=1).sum())
    if bad:
        raise NonFinitePosesError(
            f"the lengths of the class capsules are not finite for {bad} of {len(lengths)} images; "
            "the weights are of no use: take other ones, or train with a lower learning rate"
        )
