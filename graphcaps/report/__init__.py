"""The report of a run: one HTML file that needs no other."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from graphcaps.data.splits import Dataset
from graphcaps.files import named_in_errors, remove_unfinished, write_whole
from graphcaps.nets.model import CapsNet
from graphcaps.report.page import render
from graphcaps.report.records import Example, Records, choose_examples, collect, look_inside
from graphcaps.report.sections import Section, sections
from graphcaps.training.checkpoints import RunFolder


def write_report(run: RunFolder, model: CapsNet, data: Dataset, output: Path) -> None:
    """Look at a run's net on the test images and write what there is to see as one HTML file.

    Args:
        run: its settings, metrics and result.
        model: the net of its best epoch.
        data: the data set it was trained on.
        output: the file; its folder is made if it is not there. A link is followed, a device or a
            pipe is written into.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: images or classes of another data set, or `output` cannot be a file.
        OSError: `output` cannot be written; what was there is untouched.
    """
    check_writable(output)
    records = collect(run, model, data)
    # names of files need not be text
    page = render(records, sections(records)).encode(errors="backslashreplace")
    if output.exists() and not output.is_file():
        with named_in_errors(output):
            output.write_bytes(page)
        return
    output = output.resolve()
    with named_in_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(output.parent)
    write_whole(output, page)


def check_writable(output: Path) -> None:
    """See whether a report can be written.

    Raises:
        ValueError: `output` cannot be a file.
        OSError: no permission, a name that is too long.
    """
    with named_in_errors(output):
        if output.is_dir():
            raise ValueError(f"expected the name of a file to write, got the folder {output}")
        if output.exists() and not output.is_file():
            return
        file = output.resolve()
        folder = next(parent for parent in file.parents if parent.exists())
        if not folder.is_dir():
            raise ValueError(f"{output} cannot be written: {folder} is not a folder")
        for name in file.relative_to(folder).parts:
            with suppress(FileNotFoundError):
                (folder / name).lstat()  # raises where the name is too long
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


__all__ = [
    "Example",
    "Records",
    "Section",
    "check_writable",
    "choose_examples",
    "collect",
    "look_inside",
    "render",
    "sections",
    "write_report",
]
