"""Routing by variational Bayes: Ribeiro, Leontidis, Kollias 2020."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from graphcaps import reference
from graphcaps.routing.base import Iteration, Routing, Sizes, check_at_least_1
from graphcaps.routing.edges import Edges
from graphcaps.routing.gaussians import mean_of_equal_coupling, squares_about


class VariationalBayes(Routing):
    """Variational Bayes: each parent is a Gaussian with priors on its mean and precision.

    Ribeiro et al. 2020, *Capsule Routing via Variational Bayes*: the mixture of Gaussians of
    Bishop 2006, section 10.2, with priors Dirichlet(α0), N(0, 1/κ0) and Wishart(Ψ0, ν0), diagonal.
    The coupling is equal at first. The following is repeated R times:

        N_j = Σ_i a_i c_ij,   α_j = α0 + N_j,   κ_j = κ0 + N_j,   ν_j = ν0 + N_j
        m_j = Σ_i a_i c_ij û_ij / κ_j
        Ψ_j⁻¹ = Ψ0⁻¹ + Σ_i a_i c_ij (û_ij − m_j)² + κ0 m_j²
        E ln|Λ_j| = Σ_{d<D} ψ((ν_j − d)/2) + D ln 2 − Σ_d ln Ψ_jd⁻¹
        E ln π_j = ψ(α_j) − ψ(Σ_j' α_j')        over all parents of the sample
        c_ij ∝ exp(E ln π_j + ½ E ln|Λ_j| − ½ (D/κ_j + ν_j Σ_d Ψ_jd (û_ijd − m_jd)²))

        a_j = logistic(β_a − β_u − exp(E ln π_j) H_j),   H_j = ½ D ln 2πe − ½ E ln|Λ_j|

    The pose of a parent is m_j. The activation is that of the authors' code, without the BatchNorm
    that the code applies to poses and activations. It learns β_a and β_u for each type of parent;
    only their difference has an effect.

    Args:
        iterations: R.
        alpha0: concentration of the Dirichlet prior.
        kappa0: weight of the prior mean, in votes.
        psi0: diagonal of Ψ0⁻¹.
        nu0: degrees of freedom of the Wishart prior, above D − 1; D + 1 if not given.

    Raises:
        ValueError: `iterations` is below 1, or a prior is not above 0; when a layer is created,
            `nu0` is too small for D.

    >>> import torch, graphcaps as gc
    >>> graph = gc.complete_graph(6, 3)
    >>> layer = gc.CapsuleLayer(graph, 16, 16, rows=4, routing="variational_bayes")
    >>> layer(torch.rand(2, 6, 16), torch.rand(2, 6)).poses.shape
    torch.Size([2, 3, 16])
    """

    name = "variational_bayes"
    activations = True
    loss = "spread"
    matrix_poses = True

    def __init__(
        self,
        iterations: int = 3,
        *,
        alpha0: float = 1.0,
        kappa0: float = 1.0,
        psi0: float = 1.0,
        nu0: float | None = None,
    ) -> None:
        super().__init__()
        check_at_least_1("iterations", iterations)
        for name, number in (("alpha0", alpha0), ("kappa0", kappa0), ("psi0", psi0)):
            if not number > 0:
                raise ValueError(f"{name} must be above 0; got {number}")
        self.iterations = iterations
        self.alpha0, self.kappa0, self.psi0, self.nu0 = alpha0, kappa0, psi0, nu0

    def build(self, sizes: Sizes) -> None:
        """See `Routing.build`."""
        dim = sizes.parent_dim
        if self.nu0 is not None and not self.nu0 > dim - 1:
            raise ValueError(f"nu0 must be above D − 1 = {dim - 1}; got {self.nu0}")
        self.beta_a = nn.Parameter(torch.empty(sizes.types))
        self.beta_u = nn.Parameter(torch.empty(sizes.types))

    def reset_parameters(self, weight: Tensor) -> None:
        """See `Routing.reset_parameters`; β_a and β_u start at 0."""
        super().reset_parameters(weight)
        nn.init.zeros_(self.beta_a)
        nn.init.zeros_(self.beta_u)

    def steps(self, edges: Edges) -> Iterator[Iteration]:
        """See `Routing.steps`."""
        gain = edges.of_type(self.beta_a) - edges.of_type(self.beta_u)
        r = mean_of_equal_coupling(edges)
        k = q = None
        for _ in range(self.iterations):
            sums = edges.couple(k=k, q=q, r=r, a=edges.a, squares=True)
            total = edges.total_over_parents(self.alpha0 + sums.N)
            m, k, q, a = edges.update(self._posterior, sums.N, sums.S, sums.Q, r, total, gain)
            yield Iteration(sums, m, a)
            r = m

    def _posterior(
        self, N: Tensor, S: Tensor, Q: Tensor, r: Tensor, total: Tensor, gain: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dim = S.shape[1]
        nu0 = dim + 1 if self.nu0 is None else self.nu0
        kappa, nu = self.kappa0 + N, nu0 + N
        m = (S + N * r) / kappa
        inverse_psi = self.psi0 + squares_about(m, N, S, Q, r) + self.kappa0 * m.square()
        half = (nu - torch.arange(dim, dtype=nu.dtype, device=nu.device)) / 2
        log_det = (half.digamma() + math.log(2) - inverse_psi.log()).sum(dim=-1, keepdim=True)
        log_pi = (self.alpha0 + N).digamma() - total.digamma()
        k = log_pi + (log_det - dim / kappa) / 2
        entropy = (dim * math.log(2 * math.pi * math.e) - log_det) / 2
        a = (gain - log_pi.exp() * entropy).sigmoid()
        return m, k, -nu / (2 * inverse_psi), a

    def dense(
        self, u_hat: Tensor, a: Tensor | None, mask: Tensor, by_edge: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """See `Routing.dense`."""
        assert a is not None
        return reference.variational_bayes_routing(
            u_hat,
            a,
            self.beta_a,
            self.beta_u,
            self.iterations,
            mask=mask,
            alpha0=self.alpha0,
            kappa0=self.kappa0,
            psi0=self.psi0,
            nu0=self.nu0,
        )

    def extra_repr(self) -> str:
        """The options, for `print(layer)`."""
        return f"iterations={self.iterations}"
