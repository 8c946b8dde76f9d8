"""Bytes enter, a file leaves that is whole or not there, whatever happens in between; JSON too."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"  # ends the name of a file that is being written


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that whoever reads it, at whatever moment, finds the old or the new one.

    A kill may leave a hidden file with the ending `UNFINISHED` beside it.

    Args:
        path: the file; its folder exists.
        content: all of it.

    Raises:
        OSError: a full disk, no permission; what was there is untouched, nothing is left over.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
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


def flush_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Let an OSError say which file could not be written; the system often does not."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        reason = f"could not be written ({error.strerror}); what was there before is untouched"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; free some space and try again (a run: with --resume)"
        raise type(error)(error.errno, reason, str(path)) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def json_bytes(content: dict[str, Any]) -> bytes:
    """A JSON object as a file's content, for people to read."""
    return (json.dumps(content, indent=2) + "\n").encode()
