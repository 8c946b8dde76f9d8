"""The last backward pass of dynamic routing, with samples in lanes.

It computes the gradients of poses and matrices for all iterations at once; the passes before it are
in couple_passes.py. The derivation is in kernels/README.md.
"""

import numpy as np

from graphcaps.kernels.cpu.compiled import entry, inlined
from graphcaps.kernels.cpu.lanes import (
    add_dot,
    add_scaled,
    add_two_scaled,
    blocks_of,
    fill,
    lay_node_in_lanes,
    lay_node_in_samples,
    scale,
    subtract_and_multiply,
)
from graphcaps.kernels.cpu.steps import (
    FIRST,
    TOTAL,
    add_matrices,
    add_to_matrix,
    add_to_pose,
    softmax,
    sum_products,
    vote,
)


@entry
def dynamic_gradient_pass(  # noqa: PLR0912, two loops over edges, with a loop over iterations each
    u, weight, edges, children, sizes, V, q, iterations, lanes, scratch, matrix_sums, du, dweight
):
    """`∂û_e = Σ_r (c^r_e q^r + l^r_e V_{r-1})`, and from it `∂u += W ∂û` and `∂W += u ⊗ ∂û`.

    Args:
        u, weight, edges, children, sizes: as for the other passes.
        V: of all iterations but the last, `[R − 1, blocks, J, D, lanes]`.
        q: the gradients of s, `[R, blocks, J, D, lanes]`; or those of the last iteration only, in
            which case l counts as 0.
        iterations: R.
        scratch: need not be initialised.
        matrix_sums: zeros.
        du: written, `[B, I, K]`; skipped if empty.
        dweight: added to; skipped if empty.
    """
    x, u_hat, dy, rows = scratch.x, scratch.y, scratch.dy, scratch.rows
    c, g = scratch.c, scratch.g  # g becomes l; rows of all edges in one iteration, then in the next
    B, J, K, D = sizes.samples, sizes.parents, sizes.child_dim, sizes.parent_dim
    blocks = blocks_of(B, lanes)
    through_all = len(q) == iterations * blocks * J * D * 16 * len(lanes)
    begin = 0 if through_all else iterations - 1
    for block in range(blocks):
        for i in range(children[0], children[1]):
            first, degree = edges.start[i], edges.start[i + 1] - edges.start[i]
            with_rivals = degree > 1
            lay_node_in_lanes(u, B, sizes.children, block, i, K, x, FIRST, lanes)
            for e in range(degree if with_rivals else 0):
                m, j = np.int64(edges.kind[first + e]), np.int64(edges.parent[first + e])
                vote(x, weight, m, sizes, V[:0], FIRST, lanes, u_hat, FIRST)
                for t in range(max(1, begin), iterations):
                    row = t * degree + e
                    before = ((t - 1) * blocks + block) * J + j
                    _dot(c, row, u_hat, V, before, D, lanes)
                    if through_all:
                        _dot(g, row, u_hat, q, (t * blocks + block) * J + j, D, lanes)
            for t in range(begin, iterations):
                if t == 0 or not with_rivals:
                    fill(c, t * degree, c.dtype.type(1 / max(degree, 1)), degree, lanes)
                    continue
                softmax(c, t * degree, degree, False, rows, lanes)
                if through_all:
                    sum_products(c, g, t * degree, degree, rows, lanes)
                    for row in range(t * degree, (t + 1) * degree):
                        subtract_and_multiply(g, row, rows, TOTAL, c, row, lanes)
            fill(scratch.dx, FIRST, x.dtype.type(0), 2 * K, lanes)
            for e in range(degree):
                m, j = np.int64(edges.kind[first + e]), np.int64(edges.parent[first + e])
                at = block * J + j
                scale(dy, FIRST, c, begin * degree + e, q, at * D, D, lanes)
                for t in range(begin + 1, iterations):
                    row, now = t * degree + e, (t * blocks * J + at) * D
                    if with_rivals:
                        before = now - blocks * J * D
                        add_two_scaled(dy, FIRST, c, row, q, now, g, row, V, before, D, lanes)
                    else:
                        add_scaled(dy, FIRST, c, row, q, now, D, lanes)
                if dweight.size:
                    terms = edges.terms_of_kind
                    add_to_matrix(dweight, matrix_sums, terms, m, sizes, x, dy, FIRST, lanes)
                if du.size:
                    add_to_pose(scratch.dx, weight, m, sizes, dy, FIRST, e, degree, lanes)
            if du.size:
                lay_node_in_samples(scratch.dx, FIRST, B, sizes.children, block, i, K, du, lanes)
    add_matrices(dweight, matrix_sums, K * D)


@inlined
def _dot(out, o, x, y, j, D, lanes):
    """`out = x · y_j`, one row."""
    fill(out, o, out.dtype.type(0), 1, lanes)
    add_dot(out, o, x, FIRST, y, j * D, D, lanes)
