"""Reads smallNORB and affNIST from the files that their authors publish."""

import gzip
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from graphcaps.data.splits import Parts, Split, check_memory
from graphcaps.files import open_regular

NORB = {
    "training": "smallnorb-5x46789x9x18x6x2x96x96-training-{}.mat",
    "testing": "smallnorb-5x01235x9x18x6x2x96x96-testing-{}.mat",
}
NORB_CLASSES = ("animal", "human", "airplane", "truck", "car")
_NORB_TYPES: dict[int, np.dtype] = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}
_LARGEST_NORB = 1 << 30  # bytes

AFFNIST_SIZE = 40  # pixels


def holds_norb(folder: Path) -> bool:
    """Whether a folder contains files of smallNORB."""
    return any(folder.glob("smallnorb-*.mat*"))


def read_norb(folder: Path) -> Parts:
    """Read smallNORB (LeCun, Huang & Bottou 2004): toys from two cameras, 96 × 96.

    Args:
        folder: contains the files -dat.mat and -cat.mat of the training and the testing part under
            their original names, each plain or as .gz.

    Returns:
        Images with two channels, the left and the right camera; five classes.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file has the wrong content.
    """
    halves = []
    for name in NORB.values():
        images, labels = (_read_matrix(_norb_file(folder, name.format(x))) for x in ("dat", "cat"))
        if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{folder / name.format('dat')}: expected bytes [N, 2, 96, 96] and a category for "
                f"each, got {images.dtype} {list(images.shape)} and {list(labels.shape)}"
            )
        halves.append(Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))))
    return Parts(halves[0], halves[1], NORB_CLASSES)


def _norb_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(f"expected {name} or {name}.gz in {folder}, found neither")


def _read_matrix(path: Path) -> NDArray:
    """Read a matrix file: magic number and sizes as little-endian int32, then the numbers."""
    with open_regular(path) as file:
        packed = path.suffix == ".gz"
        try:
            content: bytes = (gzip.GzipFile(fileobj=file) if packed else file).read(_LARGEST_NORB)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    magic, count = (int.from_bytes(content[at : at + 4], "little") for at in (0, 4))
    kind = _NORB_TYPES.get(magic)
    if kind is None or not 1 <= count <= 4:
        raise ValueError(f"{path}: expected a matrix of bytes or integers in smallNORB's format")
    sizes = [int.from_bytes(content[at : at + 4], "little") for at in range(8, 8 + 4 * count, 4)]
    start = 8 + 4 * max(3, count)  # the header has room for at least three sizes
    whole = start + kind.itemsize * math.prod(sizes)
    if len(content) != whole:
        raise ValueError(
            f"{path}: expected {whole:,} bytes, as its header says, got {len(content):,}"
        )
    return np.frombuffer(content[start:], kind).reshape(sizes).copy()


def holds_affnist(folder: Path) -> bool:
    """Whether a folder contains the test part of affNIST."""
    return bool(_affnist_files(folder, "test"))


def read_affnist(folder: Path) -> Parts:
    """Read affNIST (Tieleman 2013): MNIST's digits under affine maps, 40 × 40.

    Args:
        folder: contains test.mat or test_batches/*.mat; for training, also training_and_validation
            or training, and validation, each as .mat or _batches/*.mat.

    Returns:
        Grey images of digits. Without files for training, the training part is empty.

    Raises:
        ValueError: A file has the wrong content.
        RuntimeError: scipy is not installed.
    """
    test = _read_affnist(_affnist_files(folder, "test"))
    training = _affnist_files(folder, "training_and_validation")
    training = training or _affnist_files(folder, "training")
    validation = _affnist_files(folder, "validation")
    nothing = Split(test.images[:0], test.labels[:0])
    train = _read_affnist(training) if training else nothing
    holdout = _read_affnist(validation) if validation else (None if training else nothing)
    return Parts(train, test, tuple("0123456789"), holdout)


def _affnist_files(folder: Path, part: str) -> list[Path]:
    whole = folder / f"{part}.mat"
    return [whole] if whole.exists() else sorted((folder / f"{part}_batches").glob("*.mat"))


def _read_affnist(paths: Sequence[Path]) -> Split:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise RuntimeError(
            'affNIST needs scipy, which is not installed: pip install "graphcaps[train]"'
        ) from error
    check_memory(sum(path.stat().st_size for path in paths), str(paths[0].parent))
    images, labels = [], []
    for path in paths:
        try:
            fields = loadmat(path)["affNISTdata"][0, 0]
            pixels, digits = fields["image"], fields["label_int"].ravel()
        except Exception as error:  # scipy may raise any exception for damaged bytes
            raise ValueError(f"{path}: expected affNISTdata in a MATLAB file: {error}") from error
        if pixels.dtype != np.uint8 or pixels.shape != (AFFNIST_SIZE**2, len(digits)):
            raise ValueError(
                f"{path}: expected bytes [{AFFNIST_SIZE**2}, {len(digits)}], got {pixels.dtype} "
                f"{list(pixels.shape)}"
            )
        images.append(torch.from_numpy(np.ascontiguousarray(pixels.T)))
        labels.append(torch.from_numpy(digits.astype(np.int64)))
    shape = (-1, 1, AFFNIST_SIZE, AFFNIST_SIZE)
    return Split(torch.cat(images).view(shape), torch.cat(labels))
