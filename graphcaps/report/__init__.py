"""The report of a run: one HTML file that needs no other."""

from pathlib import Path

from graphcaps.data.splits import Dataset
from graphcaps.explorer import check_writable, write_page
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
    check_writable(output)  # before the work, not after it
    records = collect(run, model, data)
    write_page(render(records, sections(records)), output)


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
