"""Dense routings in which every parent is a Gaussian, which is fitted to its votes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from graphcaps.reference.dense import (
    SMALLEST_MASS,
    Routed,
    at_least_one,
    edges_of,
    expect,
    softmax_over_parents,
    sum_over_children,
)


def em_routing(
    u_hat: Tensor,
    a: Tensor,
    beta_a: Tensor,
    beta_u: Tensor,
    iterations: int = 3,
    *,
    mask: Tensor | None = None,
    variant: str = "paper",
    final_inverse_temperature: float = 0.01,
    min_variance: float = 5e-4,
) -> Routed:
    """EM routing, Hinton, Sabour & Frosst 2018, procedure 1.

        c_ij = 1/(number of parents of i)
        for t = 0 .. R−1:
            M-step   w_ij = a_i c_ij,   N_j = Σ_i w_ij
                     μ_j = Σ_i w_ij û_ij / N_j
                     σ_j² = Σ_i w_ij (û_ij − μ_j)² / N_j + min_variance
                     cost_j = N_j Σ_d (β_u,j + ln σ_jd)
                     a_j = logistic(λ_t (β_a,j − cost_j)),   λ_t = λ_final (1 − 0.95^(t+1))
            E-step   p_ij = Π_d N(û_ijd; μ_jd, σ_jd²)                    (not after the last)
                     c_ij = a_j p_ij / Σ_j' a_j' p_ij'                over the parents of i

    The paper only says that λ grows; the schedule is the authors', from their answers in the
    paper's open review and from their code. `min_variance`, 5e-4 in their code, is not in the
    paper; without it, a single vote has variance 0. As a divisor, N_j is at least 1e-7, so that a
    parent without votes has finite values and μ = 0.

    `variant="authors"` computes what google-research's `capsule_em/em_layers.py` does instead:

            N_j = Σ_i w_ij + 1e-7
            μ_j = 0.9 Σ_i w_ij û_ij / N_j + 0.1 μ_j of the iteration before      (0 at first)
            a_j = logistic(λ_t (N_j (−Σ_d ln σ_jd² − β_u,j D (ln 2π + 1)) − 5000 β_a,j))

    There β_a is a cost, not a gain, and β_u scales the entropy of a unit Gaussian. Their fully
    connected layer adds 1e-5 to N and passes λ_final / 4. In their convolution only the windows of
    one type of parent compete; here all parents of a child compete, as in the paper.

    Args:
        u_hat: votes, `[B, I, J, D]`.
        a: activations of the children, from 0 to 1, `[B, I]`.
        beta_a: β_a, the gain of a parent from being active, `[J]`.
        beta_u: β_u, the cost of a vote in each dimension, `[J]`.
        iterations: R, at least 1.
        mask: which edges exist, bool `[I, J]`; all of them if not given.
        variant: `"paper"` or `"authors"`.
        final_inverse_temperature: λ_final.
        min_variance: added to the variances.

    Returns:
        The parents' poses v = μ, `[B, J, D]`, the coupling c of the last M-step, `[B, I, J]`,
        which sums to 1 over the parents of each child that has any, and activations, `[B, J]`.

    Raises:
        ValueError: a tensor has another shape, `iterations` is below 1, or `variant` is unknown.

    >>> import torch
    >>> u_hat, a, zero = torch.randn(2, 6, 3, 16), torch.rand(2, 6), torch.zeros(3)
    >>> v, c, activation = em_routing(u_hat, a, zero, zero)
    >>> v.shape, c.shape, activation.shape
    (torch.Size([2, 3, 16]), torch.Size([2, 6, 3]), torch.Size([2, 3]))
    """
    edge = edges_of(u_hat, mask)
    at_least_one(iterations)
    if variant not in ("paper", "authors"):
        raise ValueError(f"unknown variant {variant!r}; choose paper or authors")
    batch, children, parents, dim = u_hat.shape
    expect("a", a, (batch, children), "[B, I]")
    expect("beta_a", beta_a, (parents,), "[J]")
    expect("beta_u", beta_u, (parents,), "[J]")
    by_authors = variant == "authors"
    b = u_hat.new_zeros(batch, children, parents)
    mu = u_hat.new_zeros(batch, parents, dim)
    for t in range(iterations):
        c = softmax_over_parents(b, edge)
        w = a.unsqueeze(-1) * c
        mass = w.sum(dim=1)
        if by_authors:
            mass = mass + SMALLEST_MASS
        share = w / mass.clamp_min(SMALLEST_MASS).unsqueeze(1)
        mean = sum_over_children(share, u_hat)
        mu = 0.9 * mean + 0.1 * mu if by_authors else mean
        square = (u_hat - mu.unsqueeze(1)).square()
        variance = sum_over_children(share, square) + min_variance
        log_variance = variance.log().sum(dim=-1)
        if by_authors:
            entropy = beta_u * dim * (math.log(2 * math.pi) + 1)
            gain = mass * (-log_variance - entropy) - 5000 * beta_a
        else:
            gain = beta_a - mass * (dim * beta_u + log_variance / 2)
        logit = final_inverse_temperature * (1 - 0.95 ** (t + 1)) * gain
        # ln a_j + ln p_ij, with logsigmoid, because log(sigmoid) would round to ln 0
        log_normal = -(dim * math.log(2 * math.pi) + log_variance) / 2
        distance = (square / variance.unsqueeze(1)).sum(dim=-1) / 2
        b = (F.logsigmoid(logit) + log_normal).unsqueeze(1) - distance
    return Routed(mu, c, logit.sigmoid())


def variational_bayes_routing(
    u_hat: Tensor,
    a: Tensor,
    beta_a: Tensor,
    beta_u: Tensor,
    iterations: int = 3,
    *,
    mask: Tensor | None = None,
    alpha0: float = 1.0,
    m0: float | Tensor = 0.0,
    kappa0: float = 1.0,
    psi0: float | Tensor = 1.0,
    nu0: float | None = None,
) -> Routed:
    """Routing by variational Bayes, Ribeiro, Leontidis & Kollias 2020.

    The parents are a mixture of Gaussians with weights π ~ Dirichlet(α), means and precisions
    μ, Λ ~ N(μ; m, (κΛ)⁻¹) Wishart(Λ; Ψ, ν), Λ diagonal in its scale Ψ.

        c_ij = 1/(number of parents of i)
        R times:   w_ij = a_i c_ij,   N_j = Σ_i w_ij
                   α_j = α0 + N_j,   κ_j = κ0 + N_j,   ν_j = ν0 + N_j
                   m_j = (κ0 m0 + Σ_i w_ij û_ij) / κ_j
                   Ψ_j⁻¹ = Ψ0⁻¹ + Σ_i w_ij (û_ij − m_j)² + κ0 (m_j − m0)²
                   E ln|Λ_j| = Σ_d<D ψ((ν_j − d)/2) + D ln 2 − Σ_d ln Ψ_jd⁻¹
                   E ln π_j = ψ(α_j) − ψ(Σ_j' α_j')
                   ln p_ij = E ln π_j + ½ E ln|Λ_j| − ½ D ln 2π
                             − ½ (D/κ_j + ν_j Σ_d Ψ_jd (û_ijd − m_jd)²)
                   c_ij = p_ij / Σ_j' p_ij'     over the parents of i (not after the last)
        a_j = logistic(β_a,j − β_u,j − exp(E ln π_j) H_j),   H_j = ½ D ln 2πe − ½ E ln|Λ_j|

    These are equations 10.46 and 10.58 to 10.66 of Bishop, Pattern Recognition and Machine
    Learning; Ψ_j⁻¹ is 10.62 with the votes taken about m_j, which needs no division by N_j. The
    activation is that of the authors' code (`src/vb_routing.py`), with Σ α over all parents of a
    sample, whereas the code sums over the types at one position. The code also normalises m and the
    argument of the logistic by BatchNorm without affine parameters; that is part of the net and is
    left out here. With it, β_a and β_u have no effect; without it, only their difference matters.

    Args:
        u_hat: votes, `[B, I, J, D]`.
        a: activations of the children, from 0 to 1, `[B, I]`.
        beta_a: β_a, the gain of a parent from being active, `[J]`.
        beta_u: β_u, the cost of being active, `[J]`.
        iterations: R, at least 1.
        mask: which edges exist, bool `[I, J]`; all of them if not given.
        alpha0: Dirichlet prior, above 0.
        m0: prior mean, a number or `[D]`.
        kappa0: weight of the prior mean, in votes, above 0.
        psi0: diagonal of Ψ0⁻¹, a number or `[D]`, above 0.
        nu0: degrees of freedom of the Wishart prior, above D − 1; D + 1 if not given.

    Returns:
        The parents' poses v = m, `[B, J, D]`, the coupling c of the last iteration,
        `[B, I, J]`, which sums to 1 over the parents of each child that has any, and
        activations, `[B, J]`.

    Raises:
        ValueError: a tensor has another shape, `iterations` is below 1, or a prior is out of range.

    >>> u_hat, a, zero = torch.randn(2, 6, 3, 16), torch.rand(2, 6), torch.zeros(3)
    >>> v, c, activation = variational_bayes_routing(u_hat, a, zero, zero)
    >>> v.shape, c.shape, activation.shape
    (torch.Size([2, 3, 16]), torch.Size([2, 6, 3]), torch.Size([2, 3]))
    """
    edge = edges_of(u_hat, mask)
    at_least_one(iterations)
    batch, children, parents, dim = u_hat.shape
    expect("a", a, (batch, children), "[B, I]")
    expect("beta_a", beta_a, (parents,), "[J]")
    expect("beta_u", beta_u, (parents,), "[J]")
    nu0 = dim + 1 if nu0 is None else nu0
    if not nu0 > dim - 1:
        raise ValueError(f"nu0 must be above D − 1 = {dim - 1}; got {nu0}")
    if not (alpha0 > 0 and kappa0 > 0):
        raise ValueError(f"alpha0 and kappa0 must be above 0; got {alpha0} and {kappa0}")
    b = u_hat.new_zeros(batch, children, parents)
    for _ in range(iterations):
        c = softmax_over_parents(b, edge)
        w = a.unsqueeze(-1) * c
        mass = w.sum(dim=1)
        alpha, kappa, nu = alpha0 + mass, kappa0 + mass, nu0 + mass
        m = (kappa0 * m0 + sum_over_children(w, u_hat)) / kappa.unsqueeze(-1)
        square = (u_hat - m.unsqueeze(1)).square()
        inverse_psi = psi0 + sum_over_children(w, square) + kappa0 * (m - m0).square()
        half = (nu.unsqueeze(-1) - torch.arange(dim, dtype=nu.dtype, device=nu.device)) / 2
        log_det = half.digamma().sum(dim=-1) + dim * math.log(2) - inverse_psi.log().sum(dim=-1)
        log_pi = alpha.digamma() - alpha.sum(dim=-1, keepdim=True).digamma()
        k = log_pi + (log_det - dim * math.log(2 * math.pi) - dim / kappa) / 2
        distance = (square * (nu.unsqueeze(-1) / inverse_psi).unsqueeze(1)).sum(dim=-1) / 2
        b = k.unsqueeze(1) - distance
    entropy = (dim * math.log(2 * math.pi * math.e) - log_det) / 2
    return Routed(m, c, (beta_a - beta_u - log_pi.exp() * entropy).sigmoid())
