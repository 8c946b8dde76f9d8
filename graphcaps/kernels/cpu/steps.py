"""Steps of the passes over the edges: votes, softmax, and sums in groups.

A step works on one child, or on one edge, for one block of samples. Indices of parents count the
parents of all blocks.
"""

import math

import numpy as np

from graphcaps.kernels.cpu.compiled import compiled, inlined
from graphcaps.kernels.cpu.lanes import (
    add,
    add_outer,
    add_product,
    add_products,
    add_scaled,
    add_scaled_with_squares,
    copy,
    copy_negative,
    exponential,
    fill,
    get,
    invert,
    maximum,
    multiply,
    put,
)

TERMS = 32  # the least length of a partial sum; one long sum in float32 would lose precision

# The rows of the array `rows`, of which each thread has one. They are np.int64 because numba would
# give each plain int a type of its own, and compile functions for each.
ACTIVATION, TOTAL, PART, LARGEST = (np.int64(row) for row in range(4))
FIRST = np.int64(0)


@inlined
def terms_of_a_sum(count):
    """The length of the partial sums of `count` terms: about the square root, at least `TERMS`."""
    return max(TERMS, int(math.sqrt(count)))


@inlined
def vote(x, weight, m, sizes, r, j, lanes, y, e):
    """`y_e = û_e − r_j` for a child with pose x."""
    K, D, P = sizes.child_dim, sizes.parent_dim, sizes.rows
    pose = P * D
    relative = r.size > 0
    if relative:
        copy_negative(y, e * pose, r, j * pose, pose, lanes)
    add_product(y, e * pose, weight, m * K * D, K, D, D, np.int64(1), x, FIRST, P, relative, lanes)


@compiled
def softmax(b, begin, degree, leak, rows, lanes):
    """Replace the logits of a child by their softmax; `leak` adds one more logit, 0.

    They are in `degree` rows of b, from row `begin` on.
    """
    zero = b.dtype.type(0)
    copy(rows, LARGEST, b, begin, 1, lanes)
    for e in range(begin + 1, begin + degree):
        maximum(rows, LARGEST, b, e, lanes)
    fill(rows, TOTAL, zero, 1, lanes)
    if leak:
        fill(rows, PART, zero, 1, lanes)
        maximum(rows, LARGEST, rows, PART, lanes)
        exponential(rows, PART, rows, LARGEST, rows, TOTAL, lanes)
    terms, end = terms_of_a_sum(degree), begin + degree
    for part in range(begin, end, terms):
        fill(rows, PART, zero, 1, lanes)
        for e in range(part, min(part + terms, end)):
            exponential(b, e, rows, LARGEST, rows, PART, lanes)
        add(rows, TOTAL, rows, PART, 1, lanes)
    invert(rows, TOTAL, lanes)
    for e in range(begin, end):
        multiply(b, e, rows, TOTAL, lanes)


@compiled
def sum_products(c, g, begin, degree, rows, lanes):
    """`Σ c g` over the edges of a child, in row `TOTAL`; c and g are in rows from `begin` on."""
    zero = c.dtype.type(0)
    fill(rows, TOTAL, zero, 1, lanes)
    terms, end = terms_of_a_sum(degree), begin + degree
    for part in range(begin, end, terms):
        fill(rows, PART, zero, 1, lanes)
        for e in range(part, min(part + terms, end)):
            add_products(rows, PART, c, e, g, e, lanes)
        add(rows, TOTAL, rows, PART, 1, lanes)


@inlined
def add_to_pose(dx, weight, m, sizes, dy, row, e, degree, lanes):
    """`∂u += W_m ∂y_e`; called for each edge of a child in turn.

    dx has rows for two poses. The second holds a partial sum, and must be 0 before the first edge.
    """
    K, D, P = sizes.child_dim, sizes.parent_dim, sizes.rows
    part = P * K
    add_product(dx, part, weight, m * K * D, D, K, np.int64(1), D, dy, row, P, True, lanes)
    if (e + 1) % terms_of_a_sum(degree) == 0 or e + 1 == degree:
        add(dx, FIRST, dx, part, part, lanes)
        fill(dx, part, dx.dtype.type(0), part, lanes)


@inlined
def add_to_parent(totals, sums, terms_of_parent, at, j, w, y, e, pose, lanes):
    """`N_j += w_e`, `S_j += w_e y_e` and `Q_j += w_e y_e²`, except for arrays that are empty.

    `sums` are partial sums of one block, whose first parent is number `at` of the totals. After
    `terms_of_parent[j]` terms they are added to the totals and set to 0.
    """
    if sums.N.size:
        add(sums.N, j, w, e, 1, lanes)
    if sums.Q.size:
        add_scaled_with_squares(sums.S, sums.Q, j * pose, w, e, y, e * pose, pose, lanes)
    elif sums.S.size:
        add_scaled(sums.S, j * pose, w, e, y, e * pose, pose, lanes)
    sums.terms[j] += 1
    if sums.terms[j] == terms_of_parent[j]:
        _add_to_totals(totals, sums, at, j, pose, lanes)


@compiled
def add_rest(totals, sums, at, pose, lanes):
    """Add the partial sums that are left to the totals of a block."""
    for j in range(len(sums.terms)):
        if sums.terms[j]:
            _add_to_totals(totals, sums, at, j, pose, lanes)


@compiled
def _add_to_totals(totals, sums, at, j, pose, lanes):
    zero = sums.N.dtype.type(0)
    if sums.N.size:
        add(totals.N, at + j, sums.N, j, 1, lanes)
        fill(sums.N, j, zero, 1, lanes)
    if sums.S.size:
        add(totals.S, (at + j) * pose, sums.S, j * pose, pose, lanes)
        fill(sums.S, j * pose, zero, pose, lanes)
    if sums.Q.size:
        add(totals.Q, (at + j) * pose, sums.Q, j * pose, pose, lanes)
        fill(sums.Q, j * pose, zero, pose, lanes)
    sums.terms[j] = 0


@inlined
def add_to_matrix(dweight, sums, terms_of_kind, m, sizes, x, dy, row, lanes):
    """`∂W_m += u ⊗ ∂y_e`.

    A matrix that several children share has a partial sum in `sums`, which is added to the gradient
    after `terms_of_kind[m]` terms.
    """
    K, D, P = sizes.child_dim, sizes.parent_dim, sizes.rows
    if not sums.weight.size:
        add_outer(dweight, m * K * D, K, D, x, FIRST, dy, row, P, lanes)
        return
    add_outer(sums.weight, m * K * D, K, D, x, FIRST, dy, row, P, lanes)
    sums.terms[m] += 1
    if sums.terms[m] == terms_of_kind[m]:
        add_matrix(dweight, sums, m, K * D)


@compiled
def add_matrices(dweight, sums, count):
    """Add the partial sums that are left to the gradients of all matrices, of `count` numbers."""
    for m in range(len(sums.terms)):
        if sums.terms[m]:
            add_matrix(dweight, sums, m, count)


@compiled
def add_matrix(dweight, sums, m, count):
    """Add the partial sum of a matrix to its gradient, and set it to 0."""
    for n in range(m * count, (m + 1) * count):
        put(dweight, n, get(dweight, n) + get(sums.weight, n))
        put(sums.weight, n, dweight.dtype.type(0))
    sums.terms[m] = 0
