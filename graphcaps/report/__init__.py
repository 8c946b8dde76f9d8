"""A run, its net and its test images enter; one HTML file that needs no other leaves."""

import errno
import os
from pathlib import Path

from graphcaps.checkpoints import RunFolder
from graphcaps.data import Dataset
from graphcaps.files import named_in_errors, write_whole
from graphcaps.model import CapsNet
from graphcaps.report.page import render
from graphcaps.report.records import Example, Records, choose_examples, collect, look_inside
from graphcaps.report.sections import Section, sections


def write_report(run: RunFolder, model: CapsNet, data: Dataset, output: Path) -> None:
    """Look at a run's net on the test images and write what there is to see as one HTML file.

    Args:
        run: its settings, metrics and result.
        model: the net of its best epoch.
        data: the data set it was trained on.
        output: the file; its folder is made if it is not there.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: images or classes of another data set, or `output` cannot be a file.
        OSError: `output` cannot be written; what was there is untouched.
    """
    _check_writable(output)  # before the work, not after it
    records = collect(run, model, data)
    write_whole(output, render(records, sections(records)).encode())


def _check_writable(output: Path) -> None:
    if output.is_dir():
        raise ValueError(f"expected the name of a file to write, got the folder {output}")
    if output.parent.exists() and not output.parent.is_dir():
        raise ValueError(f"{output} cannot be written: {output.parent} is not a folder")
    with named_in_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


__all__ = [
    "Example",
    "Records",
    "Section",
    "choose_examples",
    "collect",
    "look_inside",
    "render",
    "sections",
    "write_report",
]
