"""Atomic writes of files, and records that are validated when they are read."""

import errno
import json
import os
import stat
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, BinaryIO, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic_core import ErrorDetails

UNFINISHED = ".unfinished"  # ends the name of a file that is being written
LARGEST_RECORD = 1 << 20  # bytes of a file that holds one record

T = TypeVar("T")

record = with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
"""Decorator for a dataclass that is read from files: no other fields, no other types, no NaN."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader finds the old or the new content at any moment.

    A kill may leave a hidden file with the suffix `UNFINISHED` beside it.

    Args:
        path: the file; its folder must exist.
        content: all bytes of the file.

    Raises:
        OSError: a full disk, no permission; the old content is kept and no other file is left.
    """
    # cut, because the longest name that the system allows has no room for a suffix
    unfinished = path.with_name(f".{path.name[:40]}.{os.getpid()}{UNFINISHED}")
    with named_in_errors(path):
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove unfinished files of processes that no longer run."""
    for left in folder.glob(f".*{UNFINISHED}"):
        process = left.name.removesuffix(UNFINISHED).rpartition(".")[2]
        if process.isdecimal() and left.is_file() and not _runs(int(process)):
            left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only checks whether the process exists
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process, or not a process number
        return True
    return True


def flush_folder(folder: Path) -> None:
    """Flush a folder to disk, so that renames in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Add the name of the file to an OSError, which the system often leaves out."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        reason = f"could not be written ({error.strerror}); its old content is untouched"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; free some space and try again (for a run, with --resume)"
        raise type(error)(error.errno, reason, str(path)) from error


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a device or a pipe, or larger.
        OSError: it is a folder, or may not be read.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: expected a file of at most {most:,} bytes, got a larger one")
    return content


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading, without waiting if it is a pipe.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a device or a pipe.
        OSError: it is a folder, or may not be read.
    """
    # without O_NONBLOCK, opening a pipe waits for somebody to write to it
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path}: expected a regular file, got a device or a pipe")
        yield file


def read_record(path: Path, kind: type[T]) -> T:
    """Read a record from a JSON file.

    Args:
        path: the file.
        kind: a dataclass decorated by `record`. A field that the file lacks has its default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; the message names file and field.
        OSError: it may not be read.
    """
    return parse_record(read_bounded(path, LARGEST_RECORD), kind, str(path))


def parse_record(content: bytes, kind: type[T], source: str) -> T:
    """Parse a record from JSON.

    Args:
        content: one JSON value.
        kind: a dataclass decorated by `record`. A field that the JSON lacks has its default.
        source: the file, or line of a file, that messages name.

    Raises:
        ValueError: it is something else.

    >>> from dataclasses import dataclass
    >>> @record
    ... @dataclass(frozen=True)
    ... class Point:
    ...     x: float
    ...     y: float = 0.0
    >>> parse_record(b'{"x": 1.5}', Point, "point.json")
    Point(x=1.5, y=0.0)
    >>> parse_record(b'{"x": "left"}', Point, "point.json")
    Traceback (most recent call last):
    ValueError: point.json: x: expected a valid number, got 'left'
    """
    try:
        return _adapter(cast(Hashable, kind)).validate_json(content)
    except ValidationError as error:
        trouble = "; ".join(_told(each) for each in error.errors(include_url=False)[:3])
        raise ValueError(f"{source}: {trouble}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _told(error: ErrorDetails) -> str:
    parts = map(str, error["loc"])
    field = ".".join(
        part if part.isalnum() or part.isidentifier() else short_repr(part) for part in parts
    )
    match error["type"]:
        case "value_error":  # raised by the dataclass's __post_init__
            return error["msg"].removeprefix("Value error, ")
        case "missing" | "missing_argument":
            return f"{field}: expected this field, found it missing"
        case "unexpected_keyword_argument":
            return f"{field}: unknown field; was it written by a newer graphcaps?"
        case "json_invalid":
            return f"truncated or not JSON ({error['msg'].removeprefix('Invalid JSON: ')})"
    expected = error["msg"].replace("Input should be", "expected")
    where = f"{field}: " if field else ""
    return f"{where}{expected}, got {short_repr(error['input'])}"


def json_bytes(content: dict[str, Any]) -> bytes:
    """A JSON object as indented text for a file."""
    return (json.dumps(content, indent=2) + "\n").encode()
