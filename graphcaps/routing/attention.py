"""Inverted dot-product attention routing: Tsai, Srivastava, Goh, Salakhutdinov 2020."""

import math
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from graphcaps import reference
from graphcaps.routing.base import Iteration, Routing, Sizes, check_at_least_1
from graphcaps.routing.edges import Edges


class InvertedAttention(Routing):
    """Inverted attention: parents attend to the votes and compete for each child.

    Procedure 1 of Tsai et al. 2020, *Capsules with Inverted Dot-Product Attention Routing*
    (arXiv:2002.04764), for a single layer, which its authors call sequential routing:

        v_j = LayerNorm(Σ_i û_ij / out-degree of i)
        R − 1 times:   c = softmax of û_ij · v_j / √D over the parents of each child
                       v_j = LayerNorm(Σ_i c_ij û_ij)

    The logits are replaced at each iteration, not added up. R counts the first iteration, as
    `--num_routing` in the authors' code; the division by √D is in the code, not in the paper.
    Learns the scale and shift of LayerNorm, `[D]` each, which all parents share. All parents have
    nearly the same length, so the authors classify by a linear function of the poses, and so does
    `CapsNet`.

    Args:
        iterations: R.

    Raises:
        ValueError: iterations below 1.

    >>> import torch, graphcaps as gc
    >>> layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, routing="attention", iterations=2)
    >>> layer(torch.rand(2, 6, 4)).shape
    torch.Size([2, 3, 5])
    """

    name = "attention"
    length_is_activation = False

    def __init__(self, iterations: int = 2) -> None:
        super().__init__()
        check_at_least_1("iterations", iterations)
        self.iterations = iterations

    def build(self, sizes: Sizes) -> None:
        """See `Routing.build`."""
        self.norm = nn.LayerNorm(sizes.parent_dim)

    def reset_parameters(self, weight: Tensor) -> None:
        """See `Routing.reset_parameters`."""
        super().reset_parameters(weight)
        self.norm.reset_parameters()

    def steps(self, edges: Edges) -> Iterator[Iteration]:
        """See `Routing.steps`."""
        p = None
        for _ in range(self.iterations):
            sums = edges.couple(p=p)
            (v,) = edges.update(self._normalise, sums.S)
            yield Iteration(sums, v)
            p = v / math.sqrt(edges.dim)

    def _normalise(self, s: Tensor) -> tuple[Tensor]:
        weight, bias = self.norm.weight.to(s), self.norm.bias.to(s)  # these may be in bfloat16
        return (F.layer_norm(s, s.shape[1:], weight, bias, self.norm.eps),)

    def dense(
        self, u_hat: Tensor, a: Tensor | None, mask: Tensor, by_edge: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """See `Routing.dense`."""
        return reference.inverted_attention_routing(
            u_hat,
            self.iterations,
            mask=mask,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
        )

    def extra_repr(self) -> str:
        """The options, for `print(layer)`."""
        return f"iterations={self.iterations}"
