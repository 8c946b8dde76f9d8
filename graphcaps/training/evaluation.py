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
    """The results of a model on a set of images."""

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
        """Number of images."""
        return len(self.labels)

    @property
    def errors(self) -> int:
        """Number of images whose predicted classes are not exactly the true ones."""
        return int(self.wrong.sum())

    def confusion(self) -> Tensor:
        """Number of images of each true class (row) predicted as each class (column), `[J, J]`.

        With several classes in an image, each one that is missed counts once for each one that is
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
        """The fraction of images whose predicted classes are exactly the true ones."""
        return 1 - self.errors / self.images


def as_input(images: Tensor, model: CapsNet) -> Tensor:
    """Scale pixels to 0 to 1, in the dtype and on the device of a model.

    Args:
        images: uint8 `[B, C, H, W]`, on any device.
        model: has the dtype and device.

    Returns:
        A tensor of the same shape.
    """
    weight = next(model.parameters())
    return images.to(weight.device).to(weight.dtype) / 255


@torch.no_grad()
def evaluate(model: CapsNet, split: Split, *, batch_size: int = 200) -> Score:
    """Classify every image by its longest capsules; the loss includes its reconstruction.

    Args:
        model: evaluated in evaluation mode; its mode is restored.
        split: the images and their labels.
        batch_size: images at a time.

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
    """The data set with the classes of a model, so that the model can be evaluated on it.

    If the model has names of classes, the labels become their numbers in the model, so that the
    data may lack some of them.

    Raises:
        ValueError: the test images have another size, or more classes than the model.
    """
    config = model.config
    here = list(config.image_shape)
    there = list(data.test.images.shape[1:])
    if here != there:
        raise ValueError(
            f"the net expects images of shape {here}, but those of {data.name} have {there}: "
            "name the data set it was trained on with --dataset"
        )
    if len(data.classes) > config.classes:
        raise ValueError(
            f"the net has {config.classes} classes, but {data.name} has {len(data.classes)}: "
            "name the data set it was trained on with --dataset"
        )
    if data.labels_per_image != config.labels_per_image:
        raise ValueError(
            f"the net predicts {_many(config.labels_per_image)} in an image, but the images of "
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
    """Raise NonFinitePosesError if the length of a class capsule is not finite.

    Args:
        lengths: of all class capsules of some images, `[N, J]`.
    """
    bad = int((~lengths.isfinite()).any(dim=1).sum())
    if bad:
        raise NonFinitePosesError(
            f"the lengths of the class capsules are not finite for {bad} of {len(lengths)} images; "
            "the weights cannot be used: take others, or train with a lower learning rate"
        )
