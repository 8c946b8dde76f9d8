"""Records enter, the figures of the page leave, in the order in which they are shown."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphcaps.report.records import Records

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """A figure and the words around it."""

    title: str
    caption: str  # what is seen, in a sentence or two
    alt: str  # the same for those who do not see it
    figure: "Figure"


def sections(records: Records) -> list[Section]:
    """All figures of the page; a new one is added here.

    Args:
        records: what is known of the run.

    Returns:
        The figures with their words, in order.
    """
    return []
