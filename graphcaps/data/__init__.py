"""Data sets of labelled images, and photos of digits."""

from graphcaps.data.datasets import Dataset, Split, draw_shifts, load_dataset, shift
from graphcaps.data.images import read_digit

__all__ = ["Dataset", "Split", "draw_shifts", "load_dataset", "read_digit", "shift"]
