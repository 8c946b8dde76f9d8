"""Reads your own images: folders of image files by class, and arrays in an .npz file."""

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcaps.data.images import read_picture
from graphcaps.data.splits import Parts, Split, check_memory, resize

# extensions that torchvision's ImageFolder accepts; files with others are ignored
ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
GREY, COLOUR = 1, 3  # channels

# names of the arrays of images and labels: training, validation and test set
NPZ_NAMES = (
    (("x_train", "y_train"), ("x_val", "y_val"), ("x_test", "y_test")),
    (
        ("train_images", "train_labels"),
        ("val_images", "val_labels"),
        ("test_images", "test_labels"),
    ),
    (("images", "labels"), ("", ""), ("", "")),
)
CLASS_NAMES = "classes"  # an optional array of strings


def holds_classes(folder: Path) -> bool:
    """Whether a folder has subfolders, which are taken as classes, or as train and test."""
    return any(_subfolders(folder))


def read_folder(folder: Path, size: tuple[int, int] | None = None) -> Parts:
    """Read image files from one folder for each class.

    Args:
        folder: contains train/CLASS/… and test/CLASS/…, or only CLASS/…. Subfolders of a class are
            searched, too.
        size: height and width to which all images are scaled; if not given, all must have the same
            size.

    Returns:
        Images with three channels, or with one if all files are grey; classes sorted by name.

    Raises:
        ValueError: There are unreadable files, folders without images, or classes that only the
            test part has; the message lists all of them.
    """
    halves = [folder / "train", folder / "test"]
    if not all(half.is_dir() for half in halves):
        halves = [folder]
    classes = tuple(sorted(path.name for path in _subfolders(halves[0])))
    problems, files = [], []
    for half in halves:
        files.append(
            [
                (path, classes.index(path.parts[len(half.parts)]))
                for name in classes
                for path in _pictures(half / name)
            ]
        )
        found = {number for _, number in files[-1]}
        if half == halves[0]:
            problems += [
                f"{half / name}: expected pictures, found none"
                for number, name in enumerate(classes)
                if number not in found
            ]
        problems += [
            f"{path}: there is no such class in {halves[0]}"
            for path in sorted(_subfolders(half))
            if path.name not in classes
        ]
    if not all(files):
        problems.append(f"{folder}: expected pictures in folders by class, found none")
    paths = [path for of_half in files for path, _ in of_half]
    images, unreadable = _read_all(paths, size, str(folder))
    _raise_all(str(folder), problems + unreadable)
    labels = torch.tensor([number for of_half in files for _, number in of_half])
    splits = [
        Split(part, numbers)
        for part, numbers in zip(
            images.split([len(f) for f in files]),
            labels.split([len(f) for f in files]),
            strict=True,
        )
    ]
    return Parts(splits[0], splits[1] if len(splits) == 2 else None, classes)


def _subfolders(folder: Path) -> Iterable[Path]:
    return (path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.name[0] != "."
    )


def _read_all(
    paths: Sequence[Path], asked: tuple[int, int] | None, source: str
) -> tuple[Tensor, list[str]]:
    """Read all pictures into one tensor; also return the problems of those that cannot be read."""
    size = asked or _first_size(paths)
    check_memory(len(paths) * COLOUR * size[0] * size[1], source)
    images = torch.empty(len(paths), COLOUR, *size, dtype=torch.uint8)

    def read(number: int) -> tuple[int, tuple[int, ...], str]:
        path = paths[number]
        try:
            picture = read_picture(path)
        except (ValueError, OSError) as error:
            return GREY, size, _with_path(path, error)
        images[number] = resize(picture[None], size)[0]
        return len(picture), tuple(picture.shape[1:]), ""

    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while decoding
        found = list(pool.map(read, range(len(paths))))
    problems = [problem for *_, problem in found if problem]
    others = sum(of_picture != size for _, of_picture, _ in found)
    if others and not asked:
        problems.append(
            f"{others} of {len(paths)} pictures are not of {size[0]} × {size[1]} pixels, as the "
            "first is: give the height and width to scale all to, with --image-size"
        )
    if all(channels == GREY for channels, *_ in found):
        images = images[:, :GREY].clone()
    return images, problems


def _first_size(paths: Sequence[Path]) -> tuple[int, int]:
    for path in paths:
        try:
            height, width = read_picture(path).shape[1:]
        except (ValueError, OSError):
            continue
        return height, width
    return 1, 1


def _with_path(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{path}: {error.strerror}"
    return str(error)


def _raise_all(source: str, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{source} cannot be used:" + "".join(f"\n  {p}" for p in problems))


def read_npz(path: Path) -> Parts:
    """Read images and labels from the arrays of an .npz file.

    Args:
        path: a file with the arrays x_train, y_train, x_test, y_test, or train_images,
            train_labels, test_images, test_labels, or only images, labels. Optional arrays x_val,
            y_val or val_images, val_labels are the validation set. Images are uint8 [N, H, W],
            [N, H, W, 1] or [N, H, W, 3]. Labels are integers [N] or [N, 1]; if images show several
            classes, 0 and 1 in [N, classes]. An optional array of strings, `classes`, names the
            classes.

    Returns:
        The parts; without `classes`, the classes are named by their numbers.

    Raises:
        ValueError: The arrays are not as described; the message lists all problems.
    """
    try:
        with zipfile.ZipFile(path) as members:
            check_memory(sum(member.file_size for member in members.infolist()), str(path))
        with np.load(path, allow_pickle=False) as arrays:
            return _parts_of(arrays, str(path))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a whole .npz file: {error}") from error


def _parts_of(arrays: Mapping[str, NDArray], source: str) -> Parts:
    names = next((n for n in NPZ_NAMES if n[0][0] in arrays), None)
    if names is None:
        known = "; or ".join(f"{train[0]}, {train[1]}" for train, *_ in NPZ_NAMES)
        found = ", ".join(arrays) or "none"
        raise ValueError(f"{source}: expected arrays {known}, found {found}")
    problems: list[str] = []
    splits = [
        _split_of(arrays, images, labels, problems) if images in arrays else None
        for images, labels in names
    ]
    given = [split for split in splits if split is not None]
    shapes = {tuple(split.images.shape[1:]) for split in given}
    if not problems and len(shapes) > 1:
        problems.append(f"expected images of one shape in all parts, got {sorted(shapes)}")
    ranks = {split.labels.shape[1:] for split in given}
    if not problems and len(ranks) > 1:
        problems.append("expected labels of one kind in all parts, got " + str(sorted(ranks)))
    classes: tuple[str, ...] = ()
    if not problems:
        classes = _classes_of(arrays, given, problems)
    _raise_all(source, problems)
    train, holdout, test = splits
    assert train is not None
    return Parts(train, test, classes, holdout)


def _split_of(
    arrays: Mapping[str, NDArray], images_name: str, labels_name: str, problems: list[str]
) -> Split | None:
    if labels_name not in arrays:
        problems.append(f"{labels_name}: expected this array beside {images_name}, found none")
        return None
    here: list[str] = []
    read = {}
    for name in (images_name, labels_name):
        try:
            read[name] = arrays[name]
        except ValueError as error:  # an array of Python objects, or a truncated one
            here.append(f"{name}: {error}")
    if not here:
        images, labels = read[images_name], read[labels_name]
        shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (GREY, COLOUR))
        if images.dtype != np.uint8 or not shaped or 0 in images.shape:
            here.append(
                f"{images_name}: expected uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3], got "
                f"{images.dtype} {list(images.shape)}"
            )
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        several = labels.ndim == 2
        if labels.dtype.kind not in "iub" or labels.ndim not in (1, 2):
            here.append(
                f"{labels_name}: expected integers [N] or 0 and 1 in [N, classes], got "
                f"{labels.dtype} {list(labels.shape)}"
            )
        elif labels.size and (labels.min() < 0 or (several and labels.max() > 1)):
            here.append(
                f"{labels_name}: expected {'0 and 1' if several else 'numbers from 0'}, got "
                f"{labels.min()} to {labels.max()}"
            )
        if images.shape[:1] != labels.shape[:1]:
            here.append(
                f"{labels_name}: expected one for each of {len(images)} images, got "
                f"{labels.shape[0] if labels.ndim else 'a single one'}"
            )
    problems += here
    if here:
        return None
    pixels = torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2)
    return Split(pixels.contiguous(), torch.from_numpy(labels.astype(np.int64)))


def _classes_of(
    arrays: Mapping[str, NDArray], splits: Sequence[Split], problems: list[str]
) -> tuple[str, ...]:
    several = splits[0].labels.dim() == 2
    sizes = [s.labels.shape[1] if several else int(s.labels.max()) + 1 for s in splits]
    if CLASS_NAMES not in arrays:
        return tuple(map(str, range(max(sizes))))
    names = arrays[CLASS_NAMES]
    if names.dtype.kind != "U" or names.ndim != 1 or len(set(names.tolist())) != len(names):
        problems.append(f"{CLASS_NAMES}: expected different strings [classes], got {names.dtype}")
    elif len(names) < max(sizes) or (several and len(names) != max(sizes)):
        problems.append(f"{CLASS_NAMES}: expected names of {max(sizes)} classes, got {len(names)}")
    return tuple(map(str, names.tolist()))
