"""Bytes enter, a file leaves that is whole or not there, whatever happens in between."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
