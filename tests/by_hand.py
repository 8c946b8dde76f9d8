"""Every routing as written in its paper, in loops over Python floats, on any list of edges.

The code is slow and obvious, and shares nothing with the library, not even tensors. Edges are pairs
(i, j); `u_hat` is a list of D floats for each edge, and `a` has a float for each child. Couplings
have one float for each edge, results one entry for each parent.
"""

import math


def coupling_by_hand(edges, b, children, leak=False):
    """Softmax of the logits over the edges of each child; a leak adds one more logit, 0."""
    c = [0.0] * len(edges)
    for i in range(children):
        mine = [e for e, (child, _) in enumerate(edges) if child == i]
        most = max([b[e] for e in mine] + [0.0] * leak, default=0.0)
        total = sum(math.exp(b[e] - most) for e in mine) + leak * math.exp(-most)
        for e in mine:
            c[e] = math.exp(b[e] - most) / total
    return c


def sums_by_hand(edges, weights, features, parents):
    """The weighted sum of the edges' features for each parent."""
    dim = len(features[0])
    sums = [[0.0] * dim for _ in range(parents)]
    for (_, j), weight, feature in zip(edges, weights, features, strict=True):
        for d in range(dim):
            sums[j][d] += weight * feature[d]
    return sums


def dot(x, y):
    return sum(p * q for p, q in zip(x, y, strict=True))


def squash_by_hand(s):
    square = dot(s, s)
    if square == 0:
        return [0.0] * len(s)
    return [square / (1 + square) * x / math.sqrt(square) for x in s]


def route_by_hand(
    edges,
    u_hat,
    children,
    parents,
    iterations,
    bias=None,
    leak=False,
    accumulate=True,
    temperature=1.0,
):
    """Routing by agreement, procedure 1 of Sabour et al. 2017. Returns v, c as lists."""
    b = [0.0] * len(edges)
    for r in range(iterations):
        c = coupling_by_hand(edges, b, children, leak)
        v = []
        for j, s in enumerate(sums_by_hand(edges, c, u_hat, parents)):
            v.append(squash_by_hand([x + bias[j][d] if bias else x for d, x in enumerate(s)]))
        if r < iterations - 1:
            for e, (_, j) in enumerate(edges):
                b[e] = (b[e] if accumulate else 0.0) + dot(u_hat[e], v[j]) / temperature
    return v, c


def attention_by_hand(edges, u_hat, children, parents, iterations, weight, bias, eps=1e-5):
    """Inverted dot-product attention, procedure 1 of Tsai et al. 2020, divided by √D as coded."""
    dim = len(u_hat[0])
    b = [0.0] * len(edges)
    for _ in range(iterations):
        c = coupling_by_hand(edges, b, children)
        v = []
        for s in sums_by_hand(edges, c, u_hat, parents):
            mean = sum(s) / dim
            deviation = math.sqrt(sum((x - mean) ** 2 for x in s) / dim + eps)
            v.append([(s[d] - mean) / deviation * weight[d] + bias[d] for d in range(dim)])
        b = [dot(u_hat[e], v[j]) / math.sqrt(dim) for e, (_, j) in enumerate(edges)]
    return v, c


def self_attention_by_hand(edges, u_hat, children, parents, beta):
    """Efficient-CapsNet's routing, Mazzia et al. 2021: the dot products of all pairs of votes."""
    dim = len(u_hat[0])
    b = []
    for e, (_, j) in enumerate(edges):
        pairs = [dot(u_hat[e], u_hat[f]) for f, (_, parent) in enumerate(edges) if parent == j]
        b.append(sum(pairs) / math.sqrt(dim))
    c = coupling_by_hand(edges, b, children)
    v = []
    weights = [c[e] + beta[e] for e in range(len(edges))]
    for s in sums_by_hand(edges, weights, u_hat, parents):
        length = math.sqrt(dot(s, s))
        v.append([(1 - math.exp(-length)) * x / length if length else 0.0 for x in s])
    return v, c


def self_routing_by_hand(edges, u_hat, a, logits, children, parents):
    """Self-routing, Hahn et al. 2019; a logit for each edge. Returns v, c, a as lists."""
    c = coupling_by_hand(edges, logits, children)
    v, a_out = [], []
    for j in range(parents):
        mine = [e for e, (_, parent) in enumerate(edges) if parent == j]
        mass = sum(a[edges[e][0]] * c[e] for e in mine)
        a_out.append(mass / max(sum(a[edges[e][0]] for e in mine), 1e-7))
        pose = [0.0] * len(u_hat[0])
        for e in mine:
            share = a[edges[e][0]] * c[e] / max(mass, 1e-7)
            pose = [x + share * y for x, y in zip(pose, u_hat[e], strict=True)]
        v.append(pose)
    return v, c, a_out


def em_by_hand(
    edges,
    u_hat,
    a,
    beta_a,
    beta_u,
    children,
    parents,
    iterations,
    variant="paper",
    final=0.01,
    min_variance=5e-4,
):
    """EM routing, procedure 1 of Hinton et al. 2018, or as its authors coded it.

    Returns v, c, a as lists. Densities are multiplied as logarithms, or all of them would be 0.
    """
    dim = len(u_hat[0])
    b = [0.0] * len(edges)
    mu = [[0.0] * dim for _ in range(parents)]
    for t in range(iterations):
        inverse_temperature = final * (1 - 0.95 ** (t + 1))
        c = coupling_by_hand(edges, b, children)
        r = [c[e] * a[i] for e, (i, _) in enumerate(edges)]
        variance, log_a, a_out = [], [], []
        for j in range(parents):
            mine = [e for e, (_, parent) in enumerate(edges) if parent == j]
            mass = sum(r[e] for e in mine)
            mass = mass + 1e-7 if variant == "authors" else mass
            divisor = max(mass, 1e-7)
            variance.append([])
            gain = 0.0
            for d in range(dim):
                mean = sum(r[e] * u_hat[e][d] for e in mine) / divisor
                mu[j][d] = 0.9 * mean + 0.1 * mu[j][d] if variant == "authors" else mean
                spread = sum(r[e] * (u_hat[e][d] - mu[j][d]) ** 2 for e in mine)
                variance[j].append(spread / divisor + min_variance)
                if variant == "authors":
                    unit = math.log(2 * math.pi) + 1
                    gain -= mass * (math.log(variance[j][d]) + beta_u[j] * unit)
                else:
                    gain -= mass * (beta_u[j] + math.log(math.sqrt(variance[j][d])))
            gain += -5000 * beta_a[j] if variant == "authors" else beta_a[j]
            logit = inverse_temperature * gain
            a_out.append(1 / (1 + math.exp(-logit)))
            log_a.append(min(logit, 0.0) - math.log1p(math.exp(-abs(logit))))
        for e, (_, j) in enumerate(edges):
            b[e] = log_a[j]
            for d in range(dim):
                b[e] -= math.log(2 * math.pi * variance[j][d]) / 2
                b[e] -= (u_hat[e][d] - mu[j][d]) ** 2 / (2 * variance[j][d])
    return mu, c, a_out


def digamma_by_hand(x):
    """`ψ(x)` for x > 0: the recurrence up to 12, where the asymptotic series is exact enough."""
    result = 0.0
    while x < 12:
        result -= 1 / x
        x += 1
    result += math.log(x) - 1 / (2 * x)
    # −B_2k / (2k x^2k) for the Bernoulli numbers 1/6, −1/30, 1/42, −1/30, 5/66, −691/2730, 7/6
    terms = [-1 / 12, 1 / 120, -1 / 252, 1 / 240, -5 / 660, 691 / 32760, -1 / 12]
    return result + sum(term / x ** (2 * k) for k, term in enumerate(terms, 1))


def variational_bayes_by_hand(
    edges,
    u_hat,
    a,
    beta_a,
    beta_u,
    children,
    parents,
    iterations,
    alpha0=1.0,
    m0=0.0,
    kappa0=1.0,
    psi0=1.0,
    nu0=None,
):
    """Routing by variational Bayes, Ribeiro et al. 2020, as Bishop 2006 has it in section 10.2.

    Returns v, c, a as lists. The scatter is taken about the mean of the votes (10.62), and the
    distance of the means added.
    """
    dim = len(u_hat[0])
    nu0 = dim + 1 if nu0 is None else nu0
    b = [0.0] * len(edges)
    for _ in range(iterations):
        c = coupling_by_hand(edges, b, children)
        r = [c[e] * a[i] for e, (i, _) in enumerate(edges)]
        mass = [sum(r[e] for e, (_, p) in enumerate(edges) if p == j) for j in range(parents)]
        total = sum(alpha0 + n for n in mass)
        log_pi = [digamma_by_hand(alpha0 + n) - digamma_by_hand(total) for n in mass]
        m, inverse_scale, log_det = [], [], []
        for j in range(parents):
            mine = [e for e, (_, parent) in enumerate(edges) if parent == j]
            kappa = kappa0 + mass[j]
            m.append([])
            inverse_scale.append([])
            log_det.append(dim * math.log(2))
            for d in range(dim):
                mean = sum(r[e] * u_hat[e][d] for e in mine) / mass[j] if mass[j] else m0
                scatter = sum(r[e] * (u_hat[e][d] - mean) ** 2 for e in mine)
                away = kappa0 * mass[j] / kappa * (mean - m0) ** 2
                m[j].append((kappa0 * m0 + mass[j] * mean) / kappa)
                inverse_scale[j].append(psi0 + scatter + away)
                log_det[j] += digamma_by_hand((nu0 + mass[j] + 1 - (d + 1)) / 2)
                log_det[j] -= math.log(inverse_scale[j][d])
        for e, (_, j) in enumerate(edges):
            distance = dim / (kappa0 + mass[j])
            for d in range(dim):
                difference = u_hat[e][d] - m[j][d]
                distance += (nu0 + mass[j]) * difference**2 / inverse_scale[j][d]
            b[e] = log_pi[j] + (log_det[j] - dim * math.log(2 * math.pi) - distance) / 2
    a_out = []
    for j in range(parents):
        entropy = dim / 2 * math.log(2 * math.pi * math.e) - log_det[j] / 2
        logit = beta_a[j] - (math.exp(log_pi[j]) * entropy + beta_u[j])
        a_out.append(1 / (1 + math.exp(-logit)))
    return m, c, a_out
