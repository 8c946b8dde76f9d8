"""EM routing, matrix capsules: Hinton, Sabour, Frosst 2018."""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcaps import reference
from graphcaps.routing.base import Iteration, Routing, Sizes, check_at_least_1, check_choice
from graphcaps.routing.edges import Edges
from graphcaps.routing.gaussians import SMALLEST_MASS, mean_of_equal_coupling, squares_about


class EMRouting(Routing):
    """EM routing: each parent is a Gaussian that is fitted to its share of the votes.

    Procedure 1 of Hinton, Sabour & Frosst 2018, *Matrix capsules with EM routing*. With equal
    coupling at first, for t = 0 … R − 1:

        M-step   N_j = Σ_i a_i c_ij,   μ_j = Σ_i a_i c_ij û_ij / N_j
                 σ_j² = Σ_i a_i c_ij (û_ij − μ_j)² / N_j + min_variance
                 a_j = logistic(λ_t (β_a − N_j Σ_d (β_u + ln σ_jd)))
        E-step   c_ij = a_j p_ij / Σ_j' a_j' p_ij',   p_ij = Π_d N(û_ijd; μ_jd, σ_jd²)

    with `λ_t = final_inverse_temperature · (1 − 0.95^(t+1))`, the authors' schedule: the paper
    only says that λ grows. As a divisor, N is at least 1e-7, so that a parent without votes has
    finite values.

    `variant="authors"` follows the authors' code (google-research, `capsule_em`): the mean is 0.9
    times the new mean plus 0.1 times that of the previous iteration, which starts at 0, and

        a_j = logistic(λ_t (N_j (−Σ_d ln σ_jd² − β_u D (ln 2π + 1)) − 5000 β_a))

    Learns β_a and β_u, one of each for every type of parent. The parent's pose is μ_j.

    Args:
        iterations: R.
        variant: `"paper"` or `"authors"`.
        final_inverse_temperature: limit of λ.
        min_variance: added to every variance; 5e-4 in the authors' code, not in the paper.

    Raises:
        ValueError: `iterations` is below 1, `variant` is unknown, or a number is not above 0.

    >>> import torch, graphcaps as gc
    >>> graph = gc.complete_graph(children=6, parents=3)
    >>> layer = gc.CapsuleLayer(graph, child_dim=16, parent_dim=16, rows=4, routing="em")
    >>> capsules = layer(torch.rand(2, 6, 16), torch.rand(2, 6))
    >>> capsules.poses.shape, capsules.activations.shape
    (torch.Size([2, 3, 16]), torch.Size([2, 3]))
    """

    name = "em"
    activations = True
    loss = "spread"
    matrix_poses = True

    def __init__(
        self,
        iterations: int = 3,
        *,
        variant: Literal["paper", "authors"] = "paper",
        final_inverse_temperature: float = 0.01,
        min_variance: float = 5e-4,
    ) -> None:
        super().__init__()
        check_at_least_1("iterations", iterations)
        check_choice("variant", variant, ("paper", "authors"))
        for name, number in (
            ("final_inverse_temperature", final_inverse_temperature),
            ("min_variance", min_variance),
        ):
            if not number > 0:
                raise ValueError(f"{name} must be above 0; got {number}")
        self.iterations = iterations
        self.variant = variant
        self.final_inverse_temperature = final_inverse_temperature
        self.min_variance = min_variance

    def build(self, sizes: Sizes) -> None:
        """See `Routing.build`."""
        self.beta_a = nn.Parameter(torch.empty(sizes.types))
        self.beta_u = nn.Parameter(torch.empty(sizes.types))

    def reset_parameters(self, weight: Tensor) -> None:
        """See `Routing.reset_parameters`; β_a and β_u become 0, in the authors' variant ½."""
        super().reset_parameters(weight)
        start = 0.5 if self.variant == "authors" else 0.0
        nn.init.constant_(self.beta_a, start)
        nn.init.constant_(self.beta_u, start)

    def steps(self, edges: Edges) -> Iterator[Iteration]:
        """See `Routing.steps`."""
        betas = edges.of_type(self.beta_a), edges.of_type(self.beta_u)
        r = mean_of_equal_coupling(edges)
        k = q = None
        before = torch.zeros_like(r)  # μ of the iteration before
        for t in range(self.iterations):
            sums = edges.couple(k=k, q=q, r=r, a=edges.a, squares=True)
            mu, variance, logit = edges.update(
                self._m_step(t), sums.N, sums.S, sums.Q, r, before, *betas
            )
            yield Iteration(sums, mu, logit.sigmoid())
            log_normal = -(2 * math.pi * variance).log().sum(dim=-1, keepdim=True) / 2
            # logsigmoid, because log(sigmoid) could round to ln 0
            k, q, r = F.logsigmoid(logit) + log_normal, -0.5 / variance, mu
            before = mu

    def _m_step(self, t: int) -> Callable[..., tuple[Tensor, ...]]:
        inverse_temperature = self.final_inverse_temperature * (1 - 0.95 ** (t + 1))
        by_authors = self.variant == "authors"

        def m_step(
            N: Tensor,
            S: Tensor,
            Q: Tensor,
            r: Tensor,
            before: Tensor,
            beta_a: Tensor,
            beta_u: Tensor,
        ) -> tuple[Tensor, ...]:
            dim = S.shape[1]
            mass = N + SMALLEST_MASS if by_authors else N
            divisor = mass.clamp_min(SMALLEST_MASS)
            mean = (S + N * r) / divisor
            mu = 0.9 * mean + 0.1 * before if by_authors else mean
            variance = squares_about(mu, N, S, Q, r) / divisor + self.min_variance
            log_variance = variance.log().sum(dim=-1, keepdim=True)
            if by_authors:
                entropy = beta_u * dim * (math.log(2 * math.pi) + 1)
                gain = mass * (-log_variance - entropy) - 5000 * beta_a
            else:
                gain = beta_a - mass * (dim * beta_u + log_variance / 2)
            return mu, variance, inverse_temperature * gain

        return m_step

    def dense(
        self, u_hat: Tensor, a: Tensor | None, mask: Tensor, by_edge: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """See `Routing.dense`."""
        assert a is not None
        return reference.em_routing(
            u_hat,
            a,
            self.beta_a,
            self.beta_u,
            self.iterations,
            mask=mask,
            variant=self.variant,
            final_inverse_temperature=self.final_inverse_temperature,
            min_variance=self.min_variance,
        )

    def extra_repr(self) -> str:
        """The options, for `print(layer)`."""
        return f"iterations={self.iterations}, variant={self.variant!r}"
