"""Equal coupling, the control with which routing is compared."""

from collections.abc import Callable, Iterator

from torch import Tensor

from graphcaps import reference
from graphcaps.routing.base import Iteration, Routing
from graphcaps.routing.dynamic import squash_sums
from graphcaps.routing.edges import Edges, EdgesWithoutVotes


class UniformRouting(Routing):
    """Uniform routing: each child couples equally to all its parents, `c = 1/out-degree`.

    `v_j = squash(Σ_i c_ij û_ij)`: this is the first iteration of dynamic routing, in which all
    logits are equal. Compare with it to see the effect of routing.

    >>> import torch, graphcaps as gc
    >>> layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, routing="uniform")
    >>> layer(torch.rand(2, 6, 4)).shape
    torch.Size([2, 3, 5])
    """

    name = "uniform"

    def steps(self, edges: Edges) -> Iterator[Iteration]:
        """See `Routing.steps`."""
        sums = edges.couple()
        (v,) = edges.update(squash_sums, sums.S)
        yield Iteration(sums, v)

    def dense(
        self, u_hat: Tensor, a: Tensor | None, mask: Tensor, by_edge: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """See `Routing.dense`."""
        return reference.uniform_routing(u_hat, mask=mask)

    def by_kernel(self, edges: EdgesWithoutVotes) -> Tensor | None:
        """The first iteration of the kernel of dynamic routing."""
        return None if edges.rows > 1 else edges.route_dynamically(iterations=1)
