"""Message passing between capsules: the operations on edges that every routing is written with.

An engine is how a message is passed, never what is computed: each gives the same numbers, has no
parameters, and writes nothing on the graph. Features are plain tensors: those of edges `[B·E, ·]`
in the order of the edges, of parents `[B·J, ·]`, of children `[B·I, ·]`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from graphcaps.passing.builtin import BuiltinEngine
from graphcaps.passing.scatter import ScatterEngine
from graphcaps.passing.udf import UdfEngine
from graphcaps.structure import Structure


class MessagePassing(Protocol):
    """The operations, on the graph of a structure repeated for each sample."""

    structure: Structure
    samples: int  # B

    def __init__(self, structure: Structure, samples: int, device: torch.device) -> None:
        """Hold what the operations need of the graph on `device`."""

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """Why this engine cannot run on `device`, or None where it can."""

    def softmax_over_parents(self, b: Tensor, leak: bool = False) -> Tensor:
        """`c_e = exp b_e / Σ exp b` over the edges that compete: `[B·E, 1]` to `[B·E, 1]`.

        These are the edges of the same child, unless the graph says otherwise. With `leak`, one
        more edge of logit 0 competes with them, whose coupling is not given.
        """

    def sum_into_parents(self, w: Tensor, x: Tensor) -> Tensor:
        """`Σ_i w_ij x_ij` for every parent: `[B·E, 1]` and `[B·E, D]` to `[B·J, D]`.

        It is 0 for a parent without children.
        """

    def agreement(self, x: Tensor, p: Tensor) -> Tensor:
        """`x_ij · p_j` on every edge: `[B·E, D]` and `[B·J, D]` to `[B·E, 1]`."""

    def expand_from_parents(self, v: Tensor) -> Tensor:
        """The parent's feature on each of its edges: `[B·J, D]` to `[B·E, D]`."""

    def expand_from_children(self, a: Tensor) -> Tensor:
        """The child's feature on each of its edges: `[B·I, D]` to `[B·E, D]`."""

    def update_parents(
        self, function: Callable[..., tuple[Tensor, ...]], *features: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply a node function: `[B·J, ·]` features to a tuple of new ones."""


ENGINES: dict[str, type[MessagePassing]] = {
    "udf": UdfEngine,
    "builtin": BuiltinEngine,
    "scatter": ScatterEngine,
}


def passing_on(
    structure: Structure, engine: str, samples: int, device: torch.device
) -> MessagePassing:
    """The operations of an engine that can run, kept by the structure for the next call."""
    key = (engine, samples, device)
    return structure.keep_for_batch(key, lambda: ENGINES[engine](structure, samples, device))
