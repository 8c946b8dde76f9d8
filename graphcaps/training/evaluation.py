"""Evaluation of a model on labelled images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graphcaps.data.datasets import Dataset, Split
from graphcaps.layers import NonFinitePosesError
from graphcaps.nets.losses import capsnet_loss
from graphcaps.nets.model import CapsNet


@dataclass(frozen=True)
class Score:
    """The results of a model on a set of images."""

    lengths: Tensor  # of all class capsules, [N, J], on the CPU
    labels: Tensor  # [N], on the CPU
    loss: float  # averaged over the images

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def errors(self) -> int:
        """Number of images whose longest capsule is not that of the true class."""
        return int((self.lengths.argmax(dim=1) != self.labels).sum())

    def confusion(self) -> Tensor:
        """Number of images of each true class (row) predicted as each class (column), `[J, J]`."""
        counts = torch.zeros(self.lengths.shape[1], self.lengths.shape[1], dtype=torch.int64)
        read = self.lengths.argmax(dim=1)
        return counts.index_put((self.labels, read), torch.tensor(1), accumulate=True)

    @property
    def accuracy(self) -> float:
        """The fraction of images whose longest capsule is that of the true class."""
        return 1 - self.errors / self.images


def as_input(images: Tensor, model: CapsNet) -> Tensor:
    """Scale pixels to 0 to 1, in the dtype and on the device of a model.

    Args:
        images: uint8 `[B, C, H, W]`, on any device.
        model: has the dtype and device.

    Returns:
        A tensor of the same shape.
    """
    weight = model.capsules.weight
    return images.to(weight.device).to(weight.dtype) / 255


@torch.no_grad()
def evaluate(model: CapsNet, split: Split, *, batch_size: int = 200) -> Score:
    """Classify every image by its longest capsule; the loss includes its reconstruction.

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
    return Score(found, split.labels.cpu(), loss / len(split.labels))


def check_fits(model: CapsNet, data: Dataset) -> None:
    """Check that a model can be evaluated on a data set.

    Raises:
        ValueError: the test images have another size, or more classes than the model.
    """
    config = model.config
    here = [config.image_channels, config.image_size, config.image_size]
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
