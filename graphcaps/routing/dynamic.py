"""Routing by agreement: Sabour, Frosst, Hinton 2017."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from graphcaps import reference
from graphcaps.functional import squash
from graphcaps.routing.base import Iteration, Routing, Sizes, check_at_least_1, check_choice
from graphcaps.routing.edges import Edges, EdgesWithoutVotes


class DynamicRouting(Routing):
    """Dynamic routing: children couple more to the parents that their votes agree with.

    Procedure 1 of Sabour et al. 2017 (arXiv:1710.09829), from `b = 0`, R times:

        c = softmax of b over the parents of each child
        s_j = Σ_i c_ij û_ij (+ bias_j),   v_j = squash(s_j)
        b_ij += û_ij · v_j / temperature

    Logits start at 0 and add up dot products, so `b_ij = û_ij · V_j`, with V_j the sum of the
    earlier v_j: a pass only needs V.

    Args:
        iterations: R.
        gradients: `"all"` lets gradients flow through every iteration, as in the authors' code;
            `"last"` stops them in all but the last.
        bias: learn a vector for each type of parent that is added to s, initialised to 0.1, as in
            the authors' code.
        leak: let each child couple to one more parent with logit 0, which receives nothing: the
            leaky routing of the authors' code.
        accumulate: False uses only the last agreement as logit, `b_ij = û_ij · v_j /
            temperature`: routing as soft k-means (Wang & Liu 2018), except for their normalisation.
        temperature: divisor of the agreement.

    Raises:
        ValueError: `iterations` is below 1, `gradients` is unknown, or `temperature` is not above
            0.

    >>> import torch, graphcaps as gc
    >>> layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, routing=DynamicRouting(bias=True))
    >>> layer(torch.rand(2, 6, 4)).shape
    torch.Size([2, 3, 5])
    """

    name = "dynamic"

    bias: nn.Parameter | None

    def __init__(
        self,
        iterations: int = 3,
        *,
        gradients: Literal["all", "last"] = "all",
        bias: bool = False,
        leak: bool = False,
        accumulate: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_at_least_1("iterations", iterations)
        check_choice("gradients", gradients, ("all", "last"))
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0; got {temperature}")
        self.iterations = iterations
        self.gradients = gradients
        self.has_bias = bias
        self.leak = leak
        self.accumulate = accumulate
        self.temperature = temperature
        self.register_parameter("bias", None)

    def build(self, sizes: Sizes) -> None:
        """See `Routing.build`."""
        if self.has_bias:
            self.bias = nn.Parameter(torch.empty(sizes.types, sizes.parent_dim))

    def reset_parameters(self, weight: Tensor) -> None:
        """Initialise matrices from N(0, 0.1²) and the bias to 0.1, as the authors do."""
        super().reset_parameters(weight)
        if self.bias is not None:
            nn.init.constant_(self.bias, 0.1)

    def steps(self, edges: Edges) -> Iterator[Iteration]:
        """See `Routing.steps`."""
        bias = None if self.bias is None else edges.of_type(self.bias)
        last_alone = self.gradients == "last"
        earlier = edges.detach() if last_alone else edges
        V = None
        for iteration in range(1, self.iterations + 1):
            last = iteration == self.iterations
            sums = (edges if last else earlier).couple(
                p=V, leak=self.leak, detach_coupling=last and last_alone
            )
            s = sums.S if bias is None else sums.S + bias
            (v,) = edges.update(squash_sums, s)
            yield Iteration(sums, v)
            agreed = v / self.temperature
            V = agreed if V is None or not self.accumulate else V + agreed

    def dense(
        self, u_hat: Tensor, a: Tensor | None, mask: Tensor, by_edge: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """See `Routing.dense`."""
        return reference.dynamic_routing(
            u_hat,
            self.iterations,
            mask=mask,
            gradients=self.gradients,
            bias=self.bias,
            leak=self.leak,
            accumulate=self.accumulate,
            temperature=self.temperature,
        )

    def by_kernel(self, edges: EdgesWithoutVotes) -> Tensor | None:
        """The kernel for the paper's procedure, with one backward pass for all iterations."""
        if edges.rows > 1 or not self._as_in_the_paper:
            return None
        return edges.route_dynamically(self.iterations, self.gradients)

    @property
    def _as_in_the_paper(self) -> bool:
        return not self.has_bias and not self.leak and self.accumulate and self.temperature == 1

    def extra_repr(self) -> str:
        """The options, for `print(layer)`."""
        options = [f"iterations={self.iterations}", f"gradients={self.gradients!r}"]
        options += ["bias=True"] if self.has_bias else []
        options += ["leak=True"] if self.leak else []
        options += [] if self.accumulate else ["accumulate=False"]
        options += [] if self.temperature == 1 else [f"temperature={self.temperature}"]
        return ", ".join(options)


def squash_sums(s: Tensor) -> tuple[Tensor]:
    """The node function: squashed sums."""
    return (squash(s),)
