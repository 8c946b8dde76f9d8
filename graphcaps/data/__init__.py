"""Data sets of labelled images, by name or from your own files, and photos as their input."""

from graphcaps.data.datasets import load_dataset
from graphcaps.data.images import read_digit, read_item, read_picture
from graphcaps.data.splits import Dataset, Split, draw_shifts, resize, shift

__all__ = [
    "Dataset",
    "Split",
    "draw_shifts",
    "load_dataset",
    "read_digit",
    "read_item",
    "read_picture",
    "resize",
    "shift",
]
