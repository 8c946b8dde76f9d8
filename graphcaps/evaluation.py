"""A model and labelled images enter, how many it gets right leaves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graphcaps.data import Split
from graphcaps.losses import capsnet_loss
from graphcaps.model import CapsNet


@dataclass(frozen=True)
class Score:
    """How a model does on a set of images."""

    lengths: Tensor  # of all class capsules, [N, J], on the CPU
    labels: Tensor  # [N], on the CPU
    loss: float  # averaged over the images

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.labels)

    @property
    def errors(self) -> int:
        """How many have a longest capsule that is not the right one."""
        return int((self.lengths.argmax(dim=1) != self.labels).sum())

    def confusion(self) -> Tensor:
        """How many images of each true class (row) are read as each class (column), `[J, J]`."""
        counts = torch.zeros(self.lengths.shape[1], self.lengths.shape[1], dtype=torch.int64)
        read = self.lengths.argmax(dim=1)
        return counts.index_put((self.labels, read), torch.tensor(1), accumulate=True)

    @property
    def accuracy(self) -> float:
        """The share of images whose longest capsule is the right one, 0 to 1."""
        return 1 - self.errors / self.images


def as_input(images: Tensor, model: CapsNet) -> Tensor:
    """Pixels as the model takes them.

    Args:
        images: uint8 `[B, C, H, W]`, on any device.
        model: its weights tell device and dtype.

    Returns:
        The same from 0 to 1, where the model is.
    """
    weight = model.capsules.weight
    return images.to(weight.device).to(weight.dtype) / 255


@torch.no_grad()
def evaluate(model: CapsNet, split: Split, *, batch_size: int = 200) -> Score:
    """Classify every image by its longest capsule, and draw that capsule for the loss.

    Args:
        model: evaluated in evaluation mode, left in the mode it was in.
        split: the images and their labels.
        batch_size: how many at a time.

    Returns:
        The score over all of them.

    Raises:
        ValueError: no images.
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
        loss += float(capsnet_loss(output, images, labels)) * len(labels)
    model.train(was_training)
    return Score(torch.cat(lengths).cpu(), split.labels.cpu(), loss / len(split.labels))
