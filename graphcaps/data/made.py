"""Generates data sets from MNIST's digits, anew for every epoch of a training.

They follow published descriptions, but are not the published files: MultiMNIST and affNIST contain
other digits, and a different number of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphcaps.data.splits import Split, draw_shifts, shift

Make = Callable[[Split, torch.Generator], Split]

PAIR_SHIFT = 4  # pixels, from 28 × 28 to 36 × 36 (Sabour et al. 2017, section 6)
PLACED_SIZE = 40  # pixels, as in affNIST
# affNIST's ranges (Tieleman 2013)
ROTATION, SHEAR, SCALES = math.radians(20), 0.2, (0.8, 1.2)
_AT_A_TIME = 5000  # images whose sampling grids are in memory at once


class Recipe(NamedTuple):
    """Functions that generate the parts of a data set from those of MNIST.

    Attributes:
        train: generates the training and validation images.
        test: generates the test images.
    """

    train: Make
    test: Make


def overlay_pairs(digits: Split, generator: torch.Generator) -> Split:
    """Overlay two digits of different classes, as in MultiMNIST.

    Sabour et al. 2017, section 6: every digit is paired with a random digit of another class. Both
    are shifted by up to 4 pixels on each axis, from 28 × 28 to 36 × 36 pixels. Grey levels are
    added and clipped at 255, as in the authors' code.

    Args:
        digits: single digits, with labels [N].
        generator: random generator.

    Returns:
        As many images as digits, with labels 0 and 1 for every class, [N, classes].

    Raises:
        ValueError: All digits are of one class.

    Example:
        >>> digits = Split(torch.ones(4, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 1, 2]))
        >>> pairs = overlay_pairs(digits, torch.Generator().manual_seed(0))
        >>> pairs.images.shape, pairs.labels.sum(dim=1)
        (torch.Size([4, 1, 36, 36]), tensor([2, 2, 2, 2]))
    """
    images, labels = digits
    count, classes = len(labels), int(labels.max()) + 1
    if (labels == labels[0]).all():
        raise ValueError("expected digits of two classes or more to form pairs, got one class")
    other = torch.randint(count, (count,), generator=generator)
    while (same := labels[other] == labels).any():
        other[same] = torch.randint(count, (int(same.sum()),), generator=generator)
    wide = F.pad(images, (PAIR_SHIFT,) * 4)
    both = torch.zeros(count, classes, dtype=torch.int64)
    total = torch.zeros(wide.shape, dtype=torch.int16)
    for chosen in (torch.arange(count), other):
        total += shift(wide[chosen], draw_shifts(count, PAIR_SHIFT, generator))
        both[torch.arange(count), labels[chosen]] = 1
    return Split(total.clamp(max=255).to(torch.uint8), both)


def place(digits: Split, generator: torch.Generator) -> Split:
    """Place each digit at random on 40 × 40 pixels, as for training in Sabour et al. 2017, 5.2.

    Args:
        digits: images of at most 40 × 40 pixels.
        generator: random generator.

    Returns:
        The same digits, each image moved as a whole so that no pixel is lost.
    """
    margin = (PLACED_SIZE - digits.images.shape[-1]) // 2
    wide = F.pad(digits.images, (margin,) * 4)
    moved = shift(wide, draw_shifts(len(wide), margin, generator))
    return digits._replace(images=moved)


def transform(digits: Split, generator: torch.Generator) -> Split:
    """Apply a random affine map in affNIST's ranges to each digit, on 40 × 40 pixels.

    Rotations by −20 to 20 degrees, shears by −0.2 to 0.2, and scales of 0.8 to 1.2 on both axes are
    uniform. The position is uniform among those at which no ink is lost.

    Args:
        digits: images of at most 40 × 40 pixels.
        generator: random generator.

    Returns:
        The same digits, transformed.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(digits.labels), generator=generator)

    angle, shear = uniform(-ROTATION, ROTATION), uniform(-SHEAR, SHEAR)
    scales = torch.diag_embed(torch.stack([uniform(*SCALES), uniform(*SCALES)], dim=1))
    sheared = torch.eye(2).repeat(len(angle), 1, 1)
    sheared[:, 0, 1] = shear
    margin = (PLACED_SIZE - digits.images.shape[-1]) // 2
    images = _warp(F.pad(digits.images, (margin,) * 4), _turn(angle) @ sheared @ scales)
    shifts = torch.stack([_room(images, axis, generator) for axis in (2, 3)], dim=1)
    return digits._replace(images=shift(images, shifts))


def rotate(digits: Split, generator: torch.Generator) -> Split:
    """Rotate each digit about the image's centre by an angle that is uniform over the full circle.

    This follows mnist-rot (Larochelle et al. 2007), but uses all of MNIST's digits.
    """
    angle = 2 * math.pi * torch.rand(len(digits.labels), generator=generator)
    return digits._replace(images=_warp(digits.images, _turn(angle)))


MADE = {
    "multi-mnist": Recipe(train=overlay_pairs, test=overlay_pairs),
    "affine-mnist": Recipe(train=place, test=transform),
    "rotated-mnist": Recipe(train=rotate, test=rotate),
}


def _turn(angle: Tensor) -> Tensor:
    """Rotation matrices, [N, 2, 2], for axes that point right and down."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def _warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Apply linear maps, [N, 2, 2], about the centres of square images, with bilinear sampling."""
    warped = []
    inverse = F.pad(matrix.inverse(), (0, 1))  # maps pixels of the result to those of the image
    for some, maps in zip(images.split(_AT_A_TIME), inverse.split(_AT_A_TIME), strict=True):
        grid = F.affine_grid(maps, list(some.shape), align_corners=False)
        warped.append(F.grid_sample(some.float(), grid, align_corners=False).round().byte())
    return torch.cat(warped)


def _room(images: Tensor, axis: int, generator: torch.Generator) -> Tensor:
    """Random shifts along an axis, [N], uniform among those that lose no ink."""
    ink = (images > 0).any(dim=1).any(dim=2 if axis == 2 else 1).int()  # [N, rows or columns]
    first = ink.argmax(dim=1)
    after = ink.flip(1).argmax(dim=1)  # empty rows below the ink
    room = first + after + 1
    return (torch.rand(len(images), generator=generator) * room).long() - first
