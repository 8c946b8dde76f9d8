"""Data sets that are made here from MNIST's digits, drawn anew for every epoch of a training.

They follow published descriptions and are not the files that others have published under such
names: MultiMNIST and affNIST differ in the digits that were drawn, and in their number.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphcaps.data.splits import Split, draw_shifts, shift

Make = Callable[[Split, torch.Generator], Split]

PAIR_SHIFT = 4  # pixels, of each of two digits: 36 × 36 of 28 × 28 (Sabour et al. 2017, section 6)
PLACED_SIZE = 40  # pixels, as affNIST's
# affNIST's ranges (Tieleman 2013)
ROTATION, SHEAR, SCALES = math.radians(20), 0.2, (0.8, 1.2)
_AT_A_TIME = 5000  # images whose sampling grids are in memory at once


class Recipe(NamedTuple):
    """How the parts of a made data set come from those of MNIST.

    Attributes:
        train: makes images to train on, and those of the validation set.
        test: makes images to test on.
    """

    train: Make
    test: Make


def overlay_pairs(digits: Split, generator: torch.Generator) -> Split:
    """Two digits of different classes, one over the other: MultiMNIST.

    Sabour et al. 2017, section 6: every digit with another one, drawn from all of other classes;
    each is moved by up to 4 pixels on both axes, in 36 × 36 pixels of 28 × 28. Grey levels are
    added, to at most 255, as in the authors' code.

    Args:
        digits: single digits, with labels [N].
        generator: Source of the randomness.

    Returns:
        As many images as digits, with 0 and 1 for every class, [N, classes].

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
        raise ValueError("expected digits of two classes or more to make pairs of, got one class")
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
    """Each digit somewhere on 40 × 40 pixels, as Sabour et al. 2017, section 5.2, train on.

    Args:
        digits: images of at most 40 × 40 pixels.
        generator: Source of the randomness.

    Returns:
        The same digits, each moved as a whole so that no pixel is lost.
    """
    margin = (PLACED_SIZE - digits.images.shape[-1]) // 2
    wide = F.pad(digits.images, (margin,) * 4)
    moved = shift(wide, draw_shifts(len(wide), margin, generator))
    return digits._replace(images=moved)


def transform(digits: Split, generator: torch.Generator) -> Split:
    """Each digit under an affine map of its own, on 40 × 40 pixels, in affNIST's ranges.

    A rotation by −20 to 20 degrees, a shear by −0.2 to 0.2, scales of 0.8 to 1.2 on both axes, all
    uniform, then a place that is uniform among those where no ink is lost.

    Args:
        digits: images of at most 40 × 40 pixels.
        generator: Source of the randomness.

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
    """Each digit turned about the centre by an angle of its own, uniform over the whole circle.

    As in mnist-rot (Larochelle et al. 2007), with all of MNIST's digits.
    """
    angle = 2 * math.pi * torch.rand(len(digits.labels), generator=generator)
    return digits._replace(images=_warp(digits.images, _turn(angle)))


MADE = {
    "multi-mnist": Recipe(train=overlay_pairs, test=overlay_pairs),
    "affine-mnist": Recipe(train=place, test=transform),
    "rotated-mnist": Recipe(train=rotate, test=rotate),
}


def _turn(angle: Tensor) -> Tensor:
    """Rotations of the plane whose first axis goes right and whose second goes down, [N, 2, 2]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def _warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Square images under linear maps about their centres, [N, 2, 2], bilinearly."""
    warped = []
    inverse = F.pad(matrix.inverse(), (0, 1))  # from pixels of the result to those of the image
    for some, maps in zip(images.split(_AT_A_TIME), inverse.split(_AT_A_TIME), strict=True):
        grid = F.affine_grid(maps, list(some.shape), align_corners=False)
        warped.append(F.grid_sample(some.float(), grid, align_corners=False).round().byte())
    return torch.cat(warped)


def _room(images: Tensor, axis: int, generator: torch.Generator) -> Tensor:
    """Shifts along an axis, uniform among those that lose no ink, [N]."""
    ink = (images > 0).any(dim=1).any(dim=2 if axis == 2 else 1).int()  # [N, rows or columns]
    first = ink.argmax(dim=1)
    after = ink.flip(1).argmax(dim=1)  # empty rows below the ink
    room = first + after + 1
    return (torch.rand(len(images), generator=generator) * room).long() - first
