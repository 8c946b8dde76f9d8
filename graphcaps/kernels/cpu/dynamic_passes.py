"""The last backward pass of dynamic routing, with samples in lanes.

It computes the gradients of poses and matrices for all iterations at once; the passes before it are
in couple_passes.py. The derivation is in kernels/README.md.
"""

import numpy as np

from graphcaps.kernels.cpu.compiled import entry, inlined
from graphcaps.kernels.cpu.lanes import (
    add_dot,
    add_scaled,
    blocks_of,
    fill,
    lay_node_in_lanes,
    lay_node_in_samples,
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
def dynamic_gradient_pass(
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
    x, u_hat, c, g, rows = scratch.x, scratch.y, scratch.c, scratch.g, scratch.rows
    B, J, K, D = sizes.samples, sizes.parents, sizes.child_dim, sizes.parent_dim
    blocks = blocks_of(B, lanes)
    through_all = len(q) == iterations * blocks * J * D * 16 * len(lanes)
    for block in range(blocks):
        for i in range(children[0], children[1]):
            first, degree = edges.start[i], edges.start[i + 1] - edges.start[i]
            ends = edges.parent[first : first + degree]
            lay_node_in_lanes(u, B, sizes.children, block, i, K, x, FIRST, lanes)
            for e in range(degree):
                m = np.int64(edges.kind[first + e])
                vote(x, weight, m, sizes, V[:0], FIRST, lanes, u_hat, e)
            fill(scratch.dy, FIRST, x.dtype.type(0), degree * D, lanes)
            for t in range(0 if through_all else iterations - 1, iterations):
                at = ((t if through_all else 0) * blocks + block) * J
                before = ((t - 1) * blocks + block) * J
                if t == 0 or degree == 1:
                    fill(c, FIRST, c.dtype.type(1 / max(degree, 1)), degree, lanes)
                else:
                    _add_dots(c, u_hat, V, ends, before, D, lanes)
                    softmax(c, degree, False, rows, lanes)
                _add_weighted(scratch.dy, c, q, ends, at, D, lanes)
                if through_all and t > 0 and degree > 1:
                    _add_dots(g, u_hat, q, ends, at, D, lanes)
                    sum_products(c, g, degree, rows, lanes)
                    for e in range(degree):
                        subtract_and_multiply(g, e, rows, TOTAL, c, e, lanes)
                    _add_weighted(scratch.dy, g, V, ends, before, D, lanes)
            fill(scratch.dx, FIRST, x.dtype.type(0), 2 * K, lanes)
            for e in range(degree):
                m = np.int64(edges.kind[first + e])
                if dweight.size:
                    terms = edges.terms_of_kind
                    add_to_matrix(
                        dweight, matrix_sums, terms, m, sizes, x, scratch.dy, e * D, lanes
                    )
                if du.size:
                    add_to_pose(scratch.dx, weight, m, sizes, scratch.dy, e * D, e, degree, lanes)
            if du.size:
                lay_node_in_samples(scratch.dx, FIRST, B, sizes.children, block, i, K, du, lanes)
    add_matrices(dweight, matrix_sums, K * D)


@inlined
def _add_dots(out, u_hat, x, ends, at, D, lanes):
    """`out_e = û_e · x_j` for all edges of a child."""
    for e in range(len(ends)):
        fill(out, e, out.dtype.type(0), 1, lanes)
        add_dot(out, e, u_hat, e * D, x, (at + ends[e]) * D, D, lanes)


@inlined
def _add_weighted(out, w, x, ends, at, D, lanes):
    """`out_e += w_e x_j` for all edges of a child."""
    for e in range(len(ends)):
        add_scaled(out, e * D, w, e, x, (at + ends[e]) * D, D, lanes)
