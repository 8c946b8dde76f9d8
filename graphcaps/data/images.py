"""Reads image files: pictures unchanged, and digits normalised like those of MNIST."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from graphcaps.data.splits import ImageKind, resize, with_channels
from graphcaps.files import read_bounded

FORMATS = ("PNG", "JPEG")  # only these are opened: Pillow passes some formats to other programs
PICTURE_FORMATS = (*FORMATS, "BMP", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 1 << 26  # of a picture; phones take up to 64 million
LARGEST_FILE = 1 << 27  # bytes
_ENOUGH_PIXELS = 4_000_000  # larger pictures are scaled down before the search for a digit

# Least difference in grey levels between ink and paper; smaller ones are the paper's texture.
_LEAST_CONTRAST = 20

_Box = tuple[int, int, int, int]  # left, top, right, bottom, as Pillow crops


def read_digit(path: str | Path, size: int = 28) -> Tensor:
    """Read an image of one digit and normalise it like MNIST's digits.

    The paper's grey level is the median of the outermost pixels; ink is what differs most from it,
    darker or lighter. The digit's bounding box is scaled to 20 of 28 pixels with its aspect ratio
    preserved, its strongest ink is set to 255, and its centre of mass is moved to the centre, to
    the nearest pixel (LeCun et al. 1998, section III.A). An image of `size` by `size` pixels that
    is already light on dark is returned unchanged. Transparent parts count as white, or as black if
    the visible parts are mostly light.

    Args:
        path: PNG or JPEG, of any size up to `MOST_PIXELS` and of any mode.
        size: Height and width of the result, in pixels.

    Returns:
        uint8 [1, size, size], light on dark.

    Raises:
        ValueError: The file is not such an image, or no digit is found in it.
        OSError: The file is missing or cannot be read.
    """
    whole, ink = _read_ink(path, size, "digit")
    if whole:
        return torch.from_numpy(ink.astype(np.uint8))[None]
    digit = _scale(ink, size * 20 // 28)
    levels = (digit * (255 / float(digit.max()))).round().astype(np.uint8)
    return torch.from_numpy(_centre(levels, size))[None]


def read_item(path: str | Path, size: int = 28) -> Tensor:
    """Read an image of one item and normalise it like the clothing of Fashion-MNIST.

    Background and item are told apart as paper and ink by `read_digit`. The item's bounding box is
    scaled to the whole image with its aspect ratio preserved, and its centre is moved to that of
    the image; the background becomes black (Xiao, Rasul, Vollgraf 2017, section 2). An image of
    `size` by `size` pixels that is already light on dark is returned unchanged.

    Args:
        path: as for `read_digit`.
        size: Height and width of the result, in pixels.

    Returns:
        uint8 [1, size, size], light on dark.

    Raises:
        ValueError: The file is not such an image, or no item is found in it.
        OSError: The file is missing or cannot be read.
    """
    whole, ink = _read_ink(path, size, "item")
    levels = (ink if whole else _scale(ink, size)).round().astype(np.uint8)
    corner = [(size - length) // 2 for length in levels.shape]
    return torch.from_numpy(_place(levels, size, corner))[None]


def _read_ink(path: str | Path, size: int, what: str) -> tuple[bool, NDArray[np.float32]]:
    """The ink of an image, cut out; or True and the whole image, if it is normalised already."""
    grey = _read_grey(path)
    smooth = _smooth(grey)
    paper = np.median(_border(smooth))
    dark_on_light = paper - smooth.min() > smooth.max() - paper
    if dark_on_light:
        grey = ImageOps.invert(grey)
    _, box = _find_ink(grey, path, what)
    if grey.size == (size, size) and not dark_on_light:
        return True, np.asarray(grey, np.float32)
    # In the cropped picture the paper is more even, and a small digit is blurred less.
    ink, box = _find_ink(grey.crop(_widen(box, grey.size)), path, what)
    left, top, right, bottom = box
    return False, ink[top:bottom, left:right]


def read_picture(path: str | Path) -> Tensor:
    """Read an image file, rotated as its EXIF data say.

    Args:
        path: an image in one of `PICTURE_FORMATS`, of any size up to `MOST_PIXELS`.

    Returns:
        uint8 [1, height, width] of a grey image, [3, height, width] of any other. Transparent
        pixels become white; of 16 bits, the upper 8 are used.

    Raises:
        ValueError: The file is not such an image.
        OSError: The file is missing or cannot be read.
    """
    with _opened(path, PICTURE_FORMATS) as image:
        if image.mode.startswith("I;16"):
            return torch.from_numpy((np.asarray(image) >> 8).astype(np.uint8))[None]
        if image.mode in ("I", "F"):
            raise ValueError(f"{image.mode} has 32 bits a pixel, expected 8 or 16")
        grey = image.mode in ("1", "L", "LA", "La")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image.convert("L" if grey else "RGB"))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def read_image(
    path: str | Path, image_shape: tuple[int, int, int], image_kind: ImageKind
) -> Tensor:
    """Read an image file as input for a net.

    Args:
        path: an image.
        image_shape: channels, height and width of the net's images.
        image_kind: the kind of image that the net was trained on: digits are normalised by
            `read_digit`, items by `read_item`; pictures are only scaled to height and width.

    Returns:
        uint8, of shape `image_shape`.

    Raises:
        ValueError, OSError: as `read_digit` and `read_picture`.
    """
    channels, *size = image_shape
    if image_kind == "picture":
        image = read_picture(path)
    else:
        image = (read_digit if image_kind == "digit" else read_item)(path, min(size))
    return with_channels(resize(image[None], (size[0], size[1])), channels)[0]


@contextmanager
def _opened(path: str | Path, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Open an image file in one of these formats and rotate it as its EXIF data say.

    Raises:
        ValueError: The file is damaged, in another format or too large.
    """
    content = io.BytesIO(read_bounded(Path(path), LARGEST_FILE))
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(content, "r", formats) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"{width} × {height} pixels, more than {MOST_PIXELS:,}")
            ImageOps.exif_transpose(image, in_place=True)
            yield image
    except Exception as error:  # Pillow may raise any exception for damaged bytes
        named = f"{', '.join(formats[:-1])} or {formats[-1]}"
        raise ValueError(f"{path}: expected an image in {named}: {error}") from error


def _read_grey(path: str | Path) -> Image.Image:
    """Read an image in 256 levels of grey, scaled down if it is very large."""
    with _opened(path, FORMATS) as image:
        grey = _to_grey(image)
    width, height = grey.size
    return grey.reduce(math.ceil(math.sqrt(width * height / _ENOUGH_PIXELS)))


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode[0] == "I":  # Pillow clips values of more than 8 bits at 255
        return _stretch(np.asarray(image, np.float32))
    if not image.has_transparency_data:
        return image.convert("RGB").convert("L")
    image = image.convert("RGBA")
    grey, alpha = image.convert("L"), image.getchannel("A")
    visible = np.asarray(alpha) > 0
    mostly_light = visible.any() and np.asarray(grey)[visible].mean() > 127
    return Image.composite(grey, Image.new("L", grey.size, 0 if mostly_light else 255), alpha)


def _stretch(levels: NDArray[np.float32]) -> Image.Image:
    span = max(float(np.ptp(levels)), 1e-9)
    return Image.fromarray(((levels - levels.min()) * (255 / span)).round().astype(np.uint8))


def _smooth(grey: Image.Image) -> NDArray[np.float32]:
    """Blur enough to remove grain and JPEG artefacts, but not thin pencil strokes."""
    return np.asarray(grey.filter(ImageFilter.GaussianBlur(max(grey.size) / 200)), np.float32)


def _border(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])


def _find_ink(grey: Image.Image, path: str | Path, what: str) -> tuple[NDArray[np.float32], _Box]:
    """Return how much lighter than the paper each pixel is, and the bounding box of the ink."""
    smooth = _smooth(grey)
    paper = np.median(_border(smooth))
    if smooth.max() - paper < _LEAST_CONTRAST:
        raise ValueError(f"{path}: expected one {what} on plain paper, found none")
    threshold = _otsu((smooth - paper).clip(0))
    rows, columns = np.nonzero(smooth - paper > threshold)
    faint = smooth - paper < threshold / 2
    ink = (np.asarray(grey, np.float32) - paper).clip(0)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    return np.where(faint, np.float32(0), ink), box


def _widen(box: _Box, within: tuple[int, int]) -> _Box:
    """Add a margin of a fifth of the longer side to a box."""
    left, top, right, bottom = box
    margin = max(right - left, bottom - top) // 5
    width, height = within
    return (
        max(left - margin, 0),
        max(top - margin, 0),
        min(right + margin, width),
        min(bottom + margin, height),
    )


def _otsu(levels: NDArray[np.float32]) -> float:
    """Otsu's threshold: the level that maximises the variance between the two classes of pixels."""
    counts, edges = np.histogram(levels, bins=256)
    below, sums = counts.cumsum(), (counts * (edges[:-1] + edges[1:]) / 2).cumsum()
    above = below[-1] - below[:-1]
    difference = sums[:-1] / below[:-1] - (sums[-1] - sums[:-1]) / above
    return float(edges[1:][(below[:-1] * above * difference**2).argmax()])


def _scale(ink: NDArray[np.float32], longest: int) -> NDArray[np.float32]:
    """Scale to `longest` pixels on the longer side."""
    height, width = ink.shape
    factor = longest / max(height, width)
    shape = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(ink).resize(shape, Image.Resampling.BILINEAR), np.float32)


def _centre(digit: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Place the digit on an empty square, its centre of mass as close to the centre as possible."""
    corner = []
    for axis, length in enumerate(digit.shape):
        centre = np.average(np.arange(length), weights=digit.sum(1 - axis))
        # The centre of mass is in [13.5, 14.5) of 28 pixels, as in all MNIST digits.
        start = math.ceil(size / 2 - 0.5 - centre)
        corner.append(min(max(start, 0), size - length))
    return _place(digit, size, corner)


def _place(levels: NDArray[np.uint8], size: int, corner: Sequence[int]) -> NDArray[np.uint8]:
    """Place an image on an empty square, from row and column `corner` on."""
    canvas = np.zeros((size, size), np.uint8)
    top, left = corner
    canvas[top : top + levels.shape[0], left : left + levels.shape[1]] = levels
    return canvas
