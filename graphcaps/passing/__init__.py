"""Message passing between capsules: the operations on edges from which routings are built.

An engine determines how messages are passed, not what is computed: all engines give the same
results, have no parameters, and do not modify the graph. Features are plain tensors: `[B·E, ·]` for
edges, in the order of the edges, `[B·J, ·]` for parents and `[B·I, ·]` for children.
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
    """The operations of an engine, on the graph of a structure, repeated for each sample."""

    structure: Structure
    samples: int  # B

    def __init__(self, structure: Structure, samples: int, device: torch.device) -> None:
        """Prepare the graph for the operations on `device`."""

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """Return why this engine cannot run on `device`, or None if it can."""

    def softmax_over_parents(self, b: Tensor, leak: bool = False) -> Tensor:
        """`c_e = exp b_e / Σ exp b` over the edges that compete: `[B·E, 1]` to `[B·E, 1]`.

        These are the edges of the same child, unless the graph defines another competition. With
        `leak`, one more edge with logit 0 competes with them; its coupling is not returned.
        """

    def sum_into_parents(self, w: Tensor, x: Tensor) -> Tensor:
        """`Σ_i w_ij x_ij` for every parent: `[B·E, 1]` and `[B·E, D]` to `[B·J, D]`.

        The sum is 0 for a parent without children.
        """

    def agreement(self, x: Tensor, p: Tensor) -> Tensor:
        """`x_ij · p_j` on every edge: `[B·E, D]` and `[B·J, D]` to `[B·E, 1]`."""

    def expand_from_parents(self, v: Tensor) -> Tensor:
        """Copy each parent's feature to its edges: `[B·J, D]` to `[B·E, D]`."""

    def expand_from_children(self, a: Tensor) -> Tensor:
        """Copy each child's feature to its edges: `[B·I, D]` to `[B·E, D]`."""

    def update_parents(
        self, function: Callable[..., tuple[Tensor, ...]], *features: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply a node function to features of parents, `[B·J, ·]`; returns a tuple of new ones."""


ENGINES: dict[str, type[MessagePassing]] = {
    "udf": UdfEngine,
    "builtin": BuiltinEngine,
    "scatter": ScatterEngine,
}


def passing_on(
    structure: Structure, engine: str, samples: int, device: torch.device
) -> MessagePassing:
    """Return the operations of an engine, which the structure caches for the next call."""
    if engine == "scatter":  # prepares nothing per batch size, which may be symbolic in a trace
        return ScatterEngine(structure, samples, device)
    key = (engine, samples, device)
    return structure.keep_for_batch(key, lambda: ENGINES[engine](structure, samples, device))
