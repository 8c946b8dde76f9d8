"""Message passing with torch's index operations, on any device; DGL only stores the graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from graphcaps.structure import Groups, Structure


class ScatterEngine:
    """Gathers and scatters by index; the samples are a batch dimension."""

    def __init__(self, structure: Structure, samples: int, device: torch.device) -> None:
        self.structure, self.samples = structure, samples
        self.by_child = structure.groups("child", device)
        self.by_competition = structure.groups("competition", device)
        self.by_parent = structure.groups("parent", device)

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        return None

    def softmax_over_parents(self, b: Tensor, leak: bool = False) -> Tensor:
        competing = self.by_competition
        b = b.reshape(self.samples, len(competing.index), 1)
        number = competing.index.view(1, -1, 1).expand_as(b)
        largest = b.new_zeros(self.samples, competing.count, 1).scatter_reduce(
            1, number, b.detach(), "amax", include_self=leak
        )
        exponential = (b - competing.expand(largest, dim=1)).exp()
        total = competing.sum(exponential, dim=1)
        if leak:
            total = total + (-largest).exp()
        return (exponential / competing.expand(total, dim=1)).flatten(0, 1)

    def sum_into_parents(self, w: Tensor, x: Tensor) -> Tensor:
        weighted = (w * x).reshape(self.samples, len(self.by_parent.index), x.shape[1])
        return self.by_parent.sum(weighted, dim=1).flatten(0, 1)

    def agreement(self, x: Tensor, p: Tensor) -> Tensor:
        return torch.einsum("ed,ed->e", x, self.expand_from_parents(p)).unsqueeze(-1)

    def expand_from_parents(self, v: Tensor) -> Tensor:
        return self._expand(self.by_parent, v)

    def expand_from_children(self, a: Tensor) -> Tensor:
        return self._expand(self.by_child, a)

    def update_parents(
        self, function: Callable[..., tuple[Tensor, ...]], *features: Tensor
    ) -> tuple[Tensor, ...]:
        return function(*features)

    def _expand(self, groups: Groups, x: Tensor) -> Tensor:
        by_sample = x.reshape(self.samples, groups.count, x.shape[1])
        return groups.expand(by_sample, dim=1).flatten(0, 1)
