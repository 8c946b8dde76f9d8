"""Labelled images in memory: the parts of a data set, and operations on their pixels."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TESTED = 6  # one image in six is set aside for testing if a data set has no test part
HELD_OUT = 12  # one training image in twelve goes to the validation set

ImageKind = Literal["digit", "item", "picture"]  # see `Dataset`


class Split(NamedTuple):
    """Labelled images.

    Attributes:
        images: uint8 [N, channels, height, width].
        labels: int64 [N], indices into `Dataset.classes`; if images show several classes, 0 and 1
            for each class, [N, classes].
    """

    images: Tensor
    labels: Tensor


class Parts(NamedTuple):
    """A data set as read from files, before the validation set is drawn.

    Attributes:
        train: training images, from which the validation set is drawn if there is none.
        test: test images; None if they are to be drawn from `train`.
        classes: names of the classes.
        holdout: validation images, if the data set has them.
    """

    train: Split
    test: Split | None
    classes: tuple[str, ...]
    holdout: Split | None = None


@dataclass(frozen=True)
class Dataset:
    """A data set: training set `train`, validation set `holdout`, test set `test`.

    Attributes:
        name: the name or path from which it was loaded.
        classes: names of the classes.
        train: the training set.
        holdout: the validation set.
        test: the test set.
        image_kind: digits, light on dark and centred like MNIST's; items on a black background,
            like Fashion-MNIST's; or any pictures.
        shift: default for the largest shift of training images, in pixels.
        redraw: generates as many new training images for each epoch; None if they are always the
            same.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    holdout: Split
    test: Split
    image_kind: ImageKind = "digit"
    shift: int = 2
    redraw: Callable[[torch.Generator], Split] | None = None

    @property
    def labels_per_image(self) -> int:
        """The number of classes that every image shows; 0 if it varies."""
        if self.train.labels.dim() == 1:
            return 1
        counts = {int(count) for part in (self.train, self.test) for count in part.labels.sum(1)}
        return counts.pop() if len(counts) == 1 else 0


def draw_shifts(count: int, up_to: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw random shifts for `count` images, uniform from -up_to to up_to pixels on both axes.

    Args:
        count: Number of images.
        up_to: The largest shift, in pixels.
        generator: Random generator; torch's global one by default.

    Returns:
        int64 [count, 2]: pixels down and pixels right.

    Raises:
        ValueError: `up_to` is negative.
    """
    if up_to < 0:
        raise ValueError(f"expected up_to of 0 pixels or more, got {up_to}")
    return torch.randint(-up_to, up_to + 1, (count, 2), generator=generator)


def shift(images: Tensor, shifts: Tensor) -> Tensor:
    """Shift every image by its own offset, filling with zeros.

    Args:
        images: [N, channels, height, width], any dtype.
        shifts: Integers [N, 2]: pixels down and pixels right; negative is up and left.

    Returns:
        A new tensor like `images`.

    Raises:
        ValueError: The number of shifts is not the number of images.

    Example:
        >>> shift(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([[0, 1]]))
        tensor([[[[0, 1],
                  [0, 3]]]])
    """
    count, _, height, width = images.shape
    if shifts.shape != (count, 2):
        raise ValueError(f"expected shifts of shape [{count}, 2], got {list(shifts.shape)}")
    down, right = shifts.to(images.device).unbind(1)
    rows = torch.arange(height, device=images.device) - down[:, None]
    columns = torch.arange(width, device=images.device) - right[:, None]
    outside = ((rows < 0) | (rows >= height))[:, None, :, None]
    outside = outside | ((columns < 0) | (columns >= width))[:, None, None, :]
    rows = rows.clamp(0, height - 1)[:, None, :, None].expand_as(images)
    columns = columns.clamp(0, width - 1)[:, None, None, :].expand_as(images)
    return images.gather(2, rows).gather(3, columns).masked_fill(outside, 0)


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror some of the images left to right.

    Args:
        images: [N, channels, height, width], any dtype.
        mirrored: 1 for those to be mirrored, 0 for the others, [N].

    Returns:
        A new tensor like `images`.

    Example:
        >>> mirror(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([0, 1])).flatten(1)
        tensor([[1, 2],
                [4, 3]])
    """
    return torch.where(mirrored.bool()[:, None, None, None], images.flip(-1), images)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale images to another height and width; the aspect ratio may change.

    Args:
        images: uint8 [N, channels, height, width].
        size: height and width, in pixels.

    Returns:
        uint8 [N, channels, *size], with antialiased bilinear interpolation; `images` itself if they
        already have this size.

    Example:
        >>> resize(torch.tensor([[[[0, 100], [0, 100]]]], dtype=torch.uint8), (1, 1))
        tensor([[[[50]]]], dtype=torch.uint8)
    """
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Convert images between grey and colour.

    Args:
        images: uint8 [N, channels, height, width].
        channels: 1 weights red, green and blue as in ITU-R BT.601; 3 repeats the grey channel.
            Images with other numbers of channels are returned unchanged.

    Example:
        >>> white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
        >>> with_channels(white, 1)
        tensor([[[[255]]]], dtype=torch.uint8)
    """
    if channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        return (images * weights).sum(dim=1, keepdim=True).round().byte()
    if channels == 3 and images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    return images


def set_aside(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Split off `count` random images, stratified by class; both parts keep their order.

    Args:
        split: The images. If an image shows several classes, the first one counts.
        count: Number of images to split off.
        seed: Seed of the selection.

    Returns:
        The remaining images, and those that were split off.
    """
    total = len(split.labels)
    classes = split.labels if split.labels.dim() == 1 else split.labels.argmax(dim=1)
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[classes[shuffled].argsort(stable=True)]
    aside = torch.zeros(total, dtype=torch.bool)
    aside[by_class[torch.arange(count) * total // count]] = True
    return Split(*(part[~aside] for part in split)), Split(*(part[aside] for part in split))


def check_memory(needed: int, source: str) -> None:
    """Check that `needed` bytes of pixels fit into this machine's memory.

    Raises:
        ValueError: They do not fit.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"{source}: its images take {needed / 2**30:.1f} GiB in memory, and this machine has "
            f"{there / 2**30:.1f} GiB; use fewer images or a smaller --image-size"
        )
