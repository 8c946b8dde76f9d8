"""One pass over the edges for any routing, and its gradients, with samples in lanes.

    y_e = û_e − r_j     b_e = prior_m + k_j + p_j·y_e + q_j·y_e²     w_e = a_i (c_e + beta_m)
    N_j = Σ w_e         S_j = Σ w_e y_e                              Q_j = Σ w_e y_e²

The derivation is in kernels/README.md. An absent term is an empty array; whether it is empty is
checked once per edge or child, not in the loops over lanes. Arrays are flat:

    u, a               [B, I, P·K], [B, I]         start, parent, kind    edges sorted by child
    weight             [M, K, D]                   beta, prior            [M]
    r, p, q, S, Q      [blocks, J, P·D, lanes]     k, N                   [blocks, J, lanes]

`children` is the first child of a range and one past its last; `scratch` need not be initialised.
"""

import numpy as np

from graphcaps.kernels.cpu.compiled import compiled, entry, inlined
from graphcaps.kernels.cpu.lanes import (
    add,
    add_dot,
    add_number,
    add_scaled,
    add_slopes,
    add_squares,
    blocks_of,
    copy,
    fill,
    get,
    lay_node_in_lanes,
    lay_node_in_samples,
    multiply,
    put,
    scale,
    subtract_and_multiply,
    sum_lanes,
)
from graphcaps.kernels.cpu.steps import (
    ACTIVATION,
    FIRST,
    LARGEST,
    PART,
    TOTAL,
    add_matrices,
    add_rest,
    add_to_matrix,
    add_to_parent,
    add_to_pose,
    softmax,
    sum_products,
    terms_of_a_sum,
    vote,
)


@entry
def couple_pass(u, weight, inputs, edges, children, sizes, leak, lanes, scratch, sums, totals):
    """Add the terms of a range of children to the totals N, S and Q."""
    x, y, c, rows = scratch.x, scratch.y, scratch.c, scratch.rows
    B, J = sizes.samples, sizes.parents
    pose_of_child, pose = sizes.rows * sizes.child_dim, sizes.rows * sizes.parent_dim
    coupled, with_a = _is_coupled(inputs), inputs.a.size > 0
    for block in range(blocks_of(B, lanes)):
        at = block * J
        for i in range(children[0], children[1]):
            first, degree = edges.start[i], edges.start[i + 1] - edges.start[i]
            if degree == 0:
                continue
            lay_node_in_lanes(u, B, sizes.children, block, i, pose_of_child, x, FIRST, lanes)
            for e in range(degree):
                m, j = np.int64(edges.kind[first + e]), at + edges.parent[first + e]
                vote(x, weight, m, sizes, inputs.r, j, lanes, y, e)
                if coupled:
                    _logit(c, y, e, inputs, m, j, pose, lanes)
            if coupled:
                softmax(c, FIRST, degree, leak, rows, lanes)
            else:
                fill(c, FIRST, c.dtype.type(1 / (degree + leak)), degree, lanes)
            if with_a:
                lay_node_in_lanes(
                    inputs.a, B, sizes.children, block, i, np.int64(1), rows, ACTIVATION, lanes
                )
            for e in range(degree):
                m, j = np.int64(edges.kind[first + e]), np.int64(edges.parent[first + e])
                _weigh(c, e, inputs.beta, m, with_a, rows, lanes)
                add_to_parent(totals, sums, edges.terms_of_parent, at, j, c, y, e, pose, lanes)
        add_rest(totals, sums, at, pose, lanes)


@entry
def couple_gradient_pass(  # noqa: PLR0912, PLR0915, each term may be absent
    u,
    weight,
    inputs,
    edges,
    children,
    sizes,
    leak,
    detach_coupling,
    gradients,
    lanes,
    scratch,
    sums,
    totals,
    matrix_sums,
    outputs,
):
    """Compute the gradients of a range of children from `gradients`, those of N, S and Q.

    `totals` holds the gradients of k, p and q, `outputs` the others; empty arrays are skipped. The
    gradients of poses, `[B, I, P·K]`, and of activations, `[B, I]`, are written; all others are
    added to.
    """
    x, y, c, rows = scratch.x, scratch.y, scratch.c, scratch.rows
    g, dy = scratch.g, scratch.dy
    B, J = sizes.samples, sizes.parents
    pose_of_child, pose = sizes.rows * sizes.child_dim, sizes.rows * sizes.parent_dim
    coupled, with_a = _is_coupled(inputs), inputs.a.size > 0
    of_votes = outputs.u.size > 0 or outputs.weight.size > 0
    of_weights = outputs.a.size > 0 or outputs.beta.size > 0
    for block in range(blocks_of(B, lanes)):
        at = block * J
        for i in range(children[0], children[1]):
            first, degree = edges.start[i], edges.start[i + 1] - edges.start[i]
            with_rivals = coupled and degree + leak > 1  # a single edge has a coupling of 1
            of_logits = with_rivals and not detach_coupling
            if not (of_logits or of_votes or of_weights):
                continue
            with_g = of_logits or of_weights
            lay_node_in_lanes(u, B, sizes.children, block, i, pose_of_child, x, FIRST, lanes)
            for e in range(degree):
                m, j = np.int64(edges.kind[first + e]), at + edges.parent[first + e]
                if with_g or with_rivals or gradients.Q.size:
                    vote(x, weight, m, sizes, inputs.r, j, lanes, y, e)
                if with_rivals:
                    _logit(c, y, e, inputs, m, j, pose, lanes)
                if with_g:
                    _weight_gradient(g, y, e, gradients, j, pose, lanes)
            if with_rivals:
                softmax(c, FIRST, degree, leak, rows, lanes)
            else:
                fill(c, FIRST, c.dtype.type(1 / max(degree + leak, 1)), degree, lanes)
            if with_a:
                lay_node_in_lanes(
                    inputs.a, B, sizes.children, block, i, np.int64(1), rows, ACTIVATION, lanes
                )
            if with_g:
                sum_products(c, g, FIRST, degree, rows, lanes)
            if outputs.a.size:
                _activation_gradient(g, inputs.beta, edges.kind, first, degree, rows, lanes)
                lay_node_in_samples(
                    rows, LARGEST, B, sizes.children, block, i, np.int64(1), outputs.a, lanes
                )
            if outputs.beta.size:
                _add_beta_gradient(g, edges.kind, first, degree, with_a, rows, outputs.beta, lanes)
            fill(scratch.dx, FIRST, scratch.dx.dtype.type(0), 2 * pose_of_child, lanes)
            for e in range(degree):
                m, j = np.int64(edges.kind[first + e]), np.int64(edges.parent[first + e])
                if of_logits:
                    _logit_gradient(g, e, c, with_a, rows, lanes)
                    add_to_parent(totals, sums, edges.terms_of_parent, at, j, g, y, e, pose, lanes)
                    if outputs.prior.size:
                        outputs.prior[m] += sum_lanes(g, e, lanes)
                if of_votes:
                    _weigh(c, e, inputs.beta, m, with_a, rows, lanes)
                    _vote_gradient(
                        dy, y, c, g, e, gradients, inputs, at + j, pose, of_logits, lanes
                    )
                    if outputs.weight.size:
                        terms = edges.terms_of_kind
                        add_to_matrix(
                            outputs.weight, matrix_sums, terms, m, sizes, x, dy, FIRST, lanes
                        )
                    if outputs.u.size:
                        add_to_pose(scratch.dx, weight, m, sizes, dy, FIRST, e, degree, lanes)
            if outputs.u.size:
                lay_node_in_samples(
                    scratch.dx, FIRST, B, sizes.children, block, i, pose_of_child, outputs.u, lanes
                )
        add_rest(totals, sums, at, pose, lanes)
    add_matrices(outputs.weight, matrix_sums, sizes.child_dim * sizes.parent_dim)


@inlined
def _is_coupled(inputs):
    """Whether there are logits; without them, the coupling is equal."""
    return inputs.k.size > 0 or inputs.p.size > 0 or inputs.q.size > 0 or inputs.prior.size > 0


@inlined
def _logit(b, y, e, inputs, m, j, pose, lanes):
    """`b_e = prior_m + k_j + p_j·y_e + q_j·y_e²`."""
    if inputs.k.size:
        copy(b, e, inputs.k, j, 1, lanes)
    else:
        fill(b, e, b.dtype.type(0), 1, lanes)
    if inputs.prior.size:
        add_number(b, e, inputs.prior[m], lanes)
    if inputs.p.size:
        add_dot(b, e, y, e * pose, inputs.p, j * pose, pose, lanes)
    if inputs.q.size:
        add_squares(b, e, inputs.q, j * pose, y, e * pose, pose, lanes)


@inlined
def _weigh(c, e, beta, m, with_a, rows, lanes):
    """Replace c by `a (c + beta)`."""
    if beta.size:
        add_number(c, e, beta[m], lanes)
    if with_a:
        multiply(c, e, rows, ACTIVATION, lanes)


@inlined
def _weight_gradient(g, y, e, gradients, j, pose, lanes):
    """`g_e = ∂N_j + ∂S_j·y_e + ∂Q_j·y_e²`, the gradient of w."""
    if gradients.N.size:
        copy(g, e, gradients.N, j, 1, lanes)
    else:
        fill(g, e, g.dtype.type(0), 1, lanes)
    add_dot(g, e, y, e * pose, gradients.S, j * pose, pose, lanes)
    if gradients.Q.size:
        add_squares(g, e, gradients.Q, j * pose, y, e * pose, pose, lanes)


@compiled
def _activation_gradient(g, beta, kind, first, degree, rows, lanes):
    """`∂a = Σ (c + beta) g` in row `LARGEST`, from `Σ c g` in row `TOTAL`."""
    L = 16 * len(lanes)
    copy(rows, LARGEST, rows, TOTAL, 1, lanes)
    terms = terms_of_a_sum(degree)
    for begin in range(0, degree if beta.size else 0, terms):
        fill(rows, PART, g.dtype.type(0), 1, lanes)
        for e in range(begin, min(begin + terms, degree)):
            factor = beta[kind[first + e]]
            for n in range(L):
                put(rows, PART * L + n, get(rows, PART * L + n) + factor * get(g, e * L + n))
        add(rows, LARGEST, rows, PART, 1, lanes)


@compiled
def _add_beta_gradient(g, kind, first, degree, with_a, rows, dbeta, lanes):
    """`∂beta_m += Σ a g`."""
    for e in range(degree):
        copy(rows, PART, g, e, 1, lanes)
        if with_a:
            multiply(rows, PART, rows, ACTIVATION, lanes)
        dbeta[kind[first + e]] += sum_lanes(rows, PART, lanes)


@inlined
def _logit_gradient(g, e, c, with_a, rows, lanes):
    """Replace g by `a c (g − Σ c g)`, the gradient of the logit."""
    subtract_and_multiply(g, e, rows, TOTAL, c, e, lanes)
    if with_a:
        multiply(g, e, rows, ACTIVATION, lanes)


@inlined
def _vote_gradient(dy, y, w, g, e, gradients, inputs, j, pose, of_logits, lanes):
    """`∂y_e = w (∂S + 2 ∂Q∘y) + g (p + 2 q∘y)`, with g the gradient of the logit."""
    scale(dy, FIRST, w, e, gradients.S, j * pose, pose, lanes)
    if gradients.Q.size:
        add_slopes(dy, FIRST, w, e, gradients.Q, j * pose, y, e * pose, pose, lanes)
    if inputs.p.size and of_logits:
        add_scaled(dy, FIRST, g, e, inputs.p, j * pose, pose, lanes)
    if inputs.q.size and of_logits:
        add_slopes(dy, FIRST, g, e, inputs.q, j * pose, y, e * pose, pose, lanes)
