"""Routing by agreement as procedure 1 of Sabour et al. 2017 reads, in loops over Python floats.

Slow and obvious; it shares no line with the library, not even its tensors.
"""

import math


def route_by_hand(edges, u_hat, children, parents, iterations):
    """Args: edges, pairs (i, j); u_hat, a list of D floats per edge. Returns: v, c as lists."""
    dim = len(u_hat[0])
    b = [0.0] * len(edges)
    for r in range(iterations):
        c = [0.0] * len(edges)
        for i in range(children):
            mine = [e for e, (child, _) in enumerate(edges) if child == i]
            total = sum(math.exp(b[e]) for e in mine)
            for e in mine:
                c[e] = math.exp(b[e]) / total
        v = []
        for j in range(parents):
            s = [0.0] * dim
            for e, (_, parent) in enumerate(edges):
                if parent == j:
                    s = [s[d] + c[e] * u_hat[e][d] for d in range(dim)]
            square = sum(x * x for x in s)
            if square == 0:
                v.append([0.0] * dim)
            else:
                v.append([square / (1 + square) * x / math.sqrt(square) for x in s])
        if r < iterations - 1:
            for e, (_, j) in enumerate(edges):
                b[e] += sum(u_hat[e][d] * v[j][d] for d in range(dim))
    return v, c
