"""Self-routing: Hahn, Pyeon, Kim 2019."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from graphcaps import reference
from graphcaps.routing.base import Iteration, Routing, Sizes
from graphcaps.routing.edges import Edges
from graphcaps.routing.gaussians import SMALLEST_MASS


class SelfRouting(Routing):
    """Self-routing: the pose of a child decides which parents it couples to, without iterations.

    Equations 3 to 5 of Hahn et al. 2019, *Self-Routing Capsule Networks*:

        c = softmax of W2_eᵀ u_i + prior_m over the parents of each child
        v_j = Σ_i a_i c_ij û_ij / Σ_i a_i c_ij,   a_j = Σ_i a_i c_ij / Σ_i a_i

    where the last sum is over the children that vote for j. W2 is an additional column of the
    matrices, so `layer.weight` is `[M, K, D + 1]`. Sums are at least 1e-7 as divisors. In the
    authors' convolutions the parents in each window compete separately; here all parents of a child
    compete.

    It also learns the prior of each matrix. W2 and prior are initialised to 0, so the initial
    coupling is equal.

    >>> import torch, graphcaps as gc
    >>> layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, routing="self_routing")
    >>> poses, activations = layer(torch.rand(2, 6, 4), torch.rand(2, 6))
    >>> poses.shape, activations.shape
    (torch.Size([2, 3, 5]), torch.Size([2, 3]))
    """

    name = "self_routing"
    activations = True
    loss = "nll"
    vote_columns = 1

    def build(self, sizes: Sizes) -> None:
        """See `Routing.build`."""
        if sizes.rows != 1:
            raise ValueError(
                f"self-routing needs poses that are vectors, rows=1; got rows={sizes.rows}"
            )
        self.prior = nn.Parameter(torch.empty(sizes.kinds))

    def reset_parameters(self, weight: Tensor) -> None:
        """See `Routing.reset_parameters`; W2 and prior become 0."""
        super().reset_parameters(weight)
        with torch.no_grad():
            weight[:, :, -1] = 0
        nn.init.zeros_(self.prior)

    def steps(self, edges: Edges) -> Iterator[Iteration]:
        """See `Routing.steps`."""
        last_column = edges.zeros_of_parents()
        last_column[:, -1] = 1
        sums = edges.couple(p=last_column, prior=self.prior, a=edges.a)
        most = edges.couple(a=edges.degree() * edges.a).N
        v, a = edges.update(_mean, sums.N, sums.S, most)
        yield Iteration(sums, v, a)

    def dense(
        self, u_hat: Tensor, a: Tensor | None, mask: Tensor, by_edge: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """See `Routing.dense`."""
        assert a is not None
        logits = u_hat[..., -1] + by_edge(self.prior)
        return reference.self_routing(u_hat[..., :-1], a, logits, mask=mask)


def _mean(N: Tensor, S: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    v = S[:, :-1] / N.clamp_min(SMALLEST_MASS)
    return v, N / most.clamp_min(SMALLEST_MASS)
