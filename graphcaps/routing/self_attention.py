"""Self-attention routing of Efficient-CapsNet: Mazzia, Salvetti, Chiaberge 2021."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from graphcaps import reference
from graphcaps.functional import exponential_squash
from graphcaps.routing.base import Iteration, Routing, Sizes
from graphcaps.routing.edges import Edges


class SelfAttention(Routing):
    """Self-attention routing: the votes for a parent attend to each other, without iterations.

    Equations 5 to 8 of Mazzia et al. 2021, *Efficient-CapsNet* (arXiv:2101.12491):

        b_ij = û_ij · Σ_i' û_i'j / √D
        c = softmax of b over the parents of each child
        v_j = squash'(Σ_i (c_ij + β_ij) û_ij),   squash'(s) = (1 − e^−|s|) s/|s|

    Learns β, one number for each matrix, added after the softmax; it starts at 0.

    >>> import torch, graphcaps as gc
    >>> layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, routing="self_attention")
    >>> layer(torch.rand(2, 6, 4)).shape
    torch.Size([2, 3, 5])
    """

    name = "self_attention"

    def build(self, sizes: Sizes) -> None:
        """See `Routing.build`."""
        self.beta = nn.Parameter(torch.empty(sizes.kinds))

    def reset_parameters(self, weight: Tensor) -> None:
        """See `Routing.reset_parameters`; β starts at 0."""
        super().reset_parameters(weight)
        nn.init.zeros_(self.beta)

    def steps(self, edges: Edges) -> Iterator[Iteration]:
        """See `Routing.steps`."""
        # equal coupling is 1/out-degree: times the degree, every vote counts once
        total = edges.couple(a=edges.degree()).S
        sums = edges.couple(p=total / math.sqrt(edges.dim), beta=self.beta)
        (v,) = edges.update(_squash, sums.S)
        yield Iteration(sums, v)

    def dense(
        self, u_hat: Tensor, a: Tensor | None, mask: Tensor, by_edge: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """See `Routing.dense`."""
        return reference.self_attention_routing(u_hat, by_edge(self.beta), mask=mask)


def _squash(s: Tensor) -> tuple[Tensor]:
    return (exponential_squash(s),)
