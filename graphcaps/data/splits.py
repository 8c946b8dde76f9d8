"""Labelled images in memory: the parts of a data set, and what is done to their pixels."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TESTED = 6  # one in so many images is set aside to test, where a data set has no test part
HELD_OUT = 12  # one in so many training images goes to the validation set


class Split(NamedTuple):
    """Labelled images.

    Attributes:
        images: uint8 [N, channels, height, width].
        labels: int64 [N], indices into `Dataset.classes`; or, where an image shows several
            classes, 0 and 1 for each of them, [N, classes].
    """

    images: Tensor
    labels: Tensor


class Parts(NamedTuple):
    """A data set as read, before a validation set is drawn.

    Attributes:
        train: images to train on, and to draw the validation set from if there is none.
        test: images to test on; None if they are to be drawn from `train`.
        classes: names of the classes.
        holdout: images that come as a validation set.
    """

    train: Split
    test: Split | None
    classes: tuple[str, ...]
    holdout: Split | None = None


@dataclass(frozen=True)
class Dataset:
    """A data set: `train` to train on, `holdout` as the validation set, `test` to report on.

    Attributes:
        name: the name or path it was loaded by.
        classes: names of the classes.
        train: the training set.
        holdout: the validation set.
        test: the test set.
        image_kind: digits, light on dark and centred like MNIST's, or any pictures.
        shift: the largest shift of training images, in pixels, by default.
        redraw: makes other training images, as many, for each epoch; None if they are always the
            same.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    holdout: Split
    test: Split
    image_kind: Literal["digit", "picture"] = "digit"
    shift: int = 2
    redraw: Callable[[torch.Generator], Split] | None = None

    @property
    def labels_per_image(self) -> int:
        """The number of classes that every image shows; 0 if it differs."""
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
        ValueError: There is not one pair of shifts per image.

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


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale images to another height and width, each on its own: the aspect ratio may change.

    Args:
        images: uint8 [N, channels, height, width].
        size: height and width, in pixels.

    Returns:
        uint8 [N, channels, *size], interpolated bilinearly, averaged where pixels get fewer;
        `images` itself if they have this size.

    Example:
        >>> resize(torch.tensor([[[[0, 100], [0, 100]]]], dtype=torch.uint8), (1, 1))
        tensor([[[[50]]]], dtype=torch.uint8)
    """
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images of coloured ones, or the other way round.

    Args:
        images: uint8 [N, channels, height, width].
        channels: 1 weighs red, green and blue as ITU-R BT.601; 3 repeats grey. Images with other
            numbers of channels stay as they are.

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
    """Split off `count` images, drawn in proportion to the classes; both parts keep their order.

    Args:
        split: The images. Of several classes in an image, the first counts.
        count: How many to split off.
        seed: Draws them.

    Returns:
        What is left, and what was split off.
    """
    total = len(split.labels)
    classes = split.labels if split.labels.dim() == 1 else split.labels.argmax(dim=1)
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[classes[shuffled].argsort(stable=True)]
    aside = torch.zeros(total, dtype=torch.bool)
    aside[by_class[torch.arange(count) * total // count]] = True
    return Split(*(part[~aside] for part in split)), Split(*(part[aside] for part in split))


def check_memory(needed: int, source: str) -> None:
    """See whether so many bytes of pixels fit into this machine's memory.

    Raises:
        ValueError: They do not.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"{source}: its images take {needed / 2**30:.1f} GiB as they are kept in memory, and "
            f"this machine has {there / 2**30:.1f} GiB; take fewer, or a smaller --image-size"
        )
