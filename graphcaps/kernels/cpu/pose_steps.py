"""Steps of the passes with poses in lanes: votes, softmax, and sums in groups.

A step works on one sample. A parent's pose is padded with zeros to `width`, which is P·D rounded up
to whole vectors. To compute votes as sums of products of vectors, a child's pose is *expanded*:
`x[k, p·D + d] = u[p·K + k]`, and each matrix is repeated for every row of a pose:
`weight[m, k, p·D + d] = W_m[k, d]`. Logits and coupling are one number for each edge.
"""

import numpy as np

from graphcaps.kernels.cpu.by_pose import LANE
from graphcaps.kernels.cpu.compiled import compiled, inlined
from graphcaps.kernels.cpu.lanes import exponential, get, put
from graphcaps.kernels.cpu.steps import LARGEST, PART, TOTAL, terms_of_a_sum
from graphcaps.kernels.cpu.vectors import (
    larger,
    largest_of,
    plus,
    put_row,
    row,
    spread,
    sum_of,
    times,
)

NONE = -1e30  # logit of the padding


@compiled
def lay_pose(u, o, sizes, x, width):
    """Expand the pose that starts at element o of u."""
    K, D, P = sizes.child_dim, sizes.parent_dim, sizes.rows
    if width == D:
        for k in range(K):
            number = spread(get(u, o + k))
            for begin in range(0, width, LANE):
                put_row(x, k * width + begin, number)
        return
    for p in range(P):
        for k in range(K):
            number = get(u, o + p * K + k)
            for n in range(k * width + p * D, k * width + (p + 1) * D):
                put(x, n, number)


@inlined
def vote(x, weight, m, K, width, r, j, y, e):
    """`y_e = û_e − r_j` for a child with expanded pose x."""
    for begin in range(0, width, LANE):
        i = m * K * width + begin
        total = spread(y.dtype.type(0))
        if r.size:
            total = times(row(r, j * width + begin), spread(y.dtype.type(-1)))
        other = spread(y.dtype.type(0))
        for k in range(0, K - 1, 2):
            at = k * width
            total = plus(total, times(row(weight, i + at), row(x, begin + at)))
            at += width
            other = plus(other, times(row(weight, i + at), row(x, begin + at)))
        if K % 2:
            at = (K - 1) * width
            total = plus(total, times(row(weight, i + at), row(x, begin + at)))
        put_row(y, e * width + begin, plus(total, other))


@inlined
def dot(x, i, y, j, width):
    """`Σ_d x[d] y[d]`."""
    total = times(row(x, i), row(y, j))
    for begin in range(LANE, width, LANE):
        total = plus(total, times(row(x, i + begin), row(y, j + begin)))
    return sum_of(total)


@inlined
def dot_with_squares(x, i, y, j, width):
    """`Σ_d x[d] y[d]²`."""
    total = spread(x.dtype.type(0))
    for begin in range(0, width, LANE):
        y0 = row(y, j + begin)
        total = plus(total, times(times(row(x, i + begin), y0), y0))
    return sum_of(total)


@inlined
def scale(out, o, w, x, i, width):
    """`out[d] = w x[d]`."""
    factor = spread(w)
    for n in range(0, width, LANE):
        put_row(out, o + n, times(factor, row(x, i + n)))


@inlined
def add_scaled(out, o, w, x, i, width):
    """`out[d] += w x[d]`."""
    factor = spread(w)
    for n in range(0, width, LANE):
        put_row(out, o + n, plus(row(out, o + n), times(factor, row(x, i + n))))


@inlined
def add_scaled_with_squares(out, squares, o, w, x, i, width):
    """`out[d] += w x[d]` and `squares[d] += w x[d]²`."""
    factor = spread(w)
    for n in range(0, width, LANE):
        x0 = row(x, i + n)
        weighted = times(factor, x0)
        put_row(out, o + n, plus(row(out, o + n), weighted))
        put_row(squares, o + n, plus(row(squares, o + n), times(weighted, x0)))


@inlined
def add_slopes(out, o, w, x, i, y, j, width):
    """`out[d] += 2 w x[d] y[d]`."""
    factor = spread(w + w)
    for n in range(0, width, LANE):
        slope = times(times(factor, row(x, i + n)), row(y, j + n))
        put_row(out, o + n, plus(row(out, o + n), slope))


@compiled
def softmax(b, o, degree, leak, rows, lanes):
    """Replace `degree` logits from element o on by their softmax; `leak` adds one more logit, 0.

    The padding up to a whole vector is overwritten.
    """
    zero = b.dtype.type(0)
    count = (degree + LANE - 1) // LANE
    for e in range(degree, count * LANE):
        put(b, o + e, b.dtype.type(NONE))
    most = row(b, o)
    for n in range(1, count):
        most = larger(most, row(b, o + n * LANE))
    largest = largest_of(most)
    if leak and zero > largest:
        largest = zero
    put_row(rows, LARGEST * LANE, spread(largest))
    put_row(rows, TOTAL * LANE, spread(zero))
    terms = terms_of_a_sum(degree)  # in each lane
    first = o // LANE
    for begin in range(0, count, terms):
        put_row(rows, PART * LANE, spread(zero))
        for n in range(begin, min(begin + terms, count)):
            exponential(b, first + n, rows, LARGEST, rows, PART, lanes)
        put_row(rows, TOTAL * LANE, plus(row(rows, TOTAL * LANE), row(rows, PART * LANE)))
    total = sum_of(row(rows, TOTAL * LANE))
    if leak:
        put_row(rows, PART * LANE, spread(zero))
        exponential(rows, PART, rows, LARGEST, rows, TOTAL, lanes)
        total += get(rows, PART * LANE)
    factor = spread(b.dtype.type(1) / total)
    for n in range(o, o + count * LANE, LANE):
        put_row(b, n, times(row(b, n), factor))


@compiled
def logit_gradients(c, g, o, degree):
    """Replace g by `c (g − Σ c g)` for the edges that compete, from element o on."""
    total = c.dtype.type(0)
    terms = terms_of_a_sum(degree) * LANE
    for begin in range(0, degree, terms):
        part = spread(c.dtype.type(0))
        end = min(begin + terms, degree)
        whole = begin + (end - begin) // LANE * LANE
        for e in range(begin, whole, LANE):
            part = plus(part, times(row(c, o + e), row(g, o + e)))
        rest = c.dtype.type(0)
        for e in range(whole, end):
            rest += get(c, o + e) * get(g, o + e)
        total += sum_of(part) + rest
    for e in range(o, o + degree):
        put(g, e, get(c, e) * (get(g, e) - total))


@inlined
def add_to_parent(sums, j, w, y, e, width):
    """`N_j += w`, `S_j += w y_e` and `Q_j += w y_e²`, except for arrays that are empty."""
    if sums.N.size:
        put(sums.N, j, get(sums.N, j) + w)
    if sums.Q.size:
        add_scaled_with_squares(sums.S, sums.Q, j * width, w, y, e * width, width)
    elif sums.S.size:
        add_scaled(sums.S, j * width, w, y, e * width, width)


@compiled
def count_terms(totals, sums, terms_of_parent, parent, first, degree, at, samples, J, width):
    """Count the terms of a group, and add to the totals those partial sums that are full."""
    for e in range(first, first + degree):
        j = np.int64(parent[e])
        sums.terms[j] += 1
        if sums.terms[j] >= terms_of_parent[j]:
            _add_to_totals(totals, sums, at, j, samples, J, width)


@compiled
def add_rest(totals, sums, at, samples, J, width):
    """Add the partial sums that are left to the totals of some samples."""
    for j in range(J):
        if sums.terms[j]:
            _add_to_totals(totals, sums, at, j, samples, J, width)


@compiled
def _add_to_totals(totals, sums, at, j, samples, J, width):
    """Add the sums of parent j to the totals of `samples` samples, whose first parent is `at`."""
    for s in range(samples):
        o, i = at + s * J + j, s * J + j
        if sums.N.size:
            put(totals.N, o, get(totals.N, o) + get(sums.N, i))
            put(sums.N, i, sums.N.dtype.type(0))
        if sums.S.size:
            _move(totals.S, o * width, sums.S, i * width, width)
        if sums.Q.size:
            _move(totals.Q, o * width, sums.Q, i * width, width)
    sums.terms[j] = 0


@inlined
def _move(out, o, x, i, count):
    """`out[d] += x[d]`, then `x[d] = 0`."""
    zero = spread(x.dtype.type(0))
    for n in range(0, count, LANE):
        put_row(out, o + n, plus(row(out, o + n), row(x, i + n)))
        put_row(x, i + n, zero)


@compiled
def add_gradients(dweight, of_weight, dx, of_pose, x, weight, kind, first, count, K, width, dy):
    """`∂W_m += u ⊗ ∂y` and `∂x = W_m ∂y` for `count` edges of one child, with ∂x expanded.

    The edges start at number `first`; the gradients of their votes are in the first rows of dy.
    """
    for k in range(K):
        for begin in range(0, width, LANE):
            i = k * width + begin
            pose, total = row(x, i), spread(x.dtype.type(0))
            for n in range(count):
                m = (np.int64(kind[first + n]) * K + k) * width + begin
                gradient = row(dy, n * width + begin)
                if of_weight:
                    put_row(dweight, m, plus(row(dweight, m), times(pose, gradient)))
                if of_pose:
                    total = plus(total, times(row(weight, m), gradient))
            if of_pose:
                put_row(dx, i, total)


@compiled
def add_pose_gradient(du, o, sizes, dx, width):
    """`∂u[p·K + k] += Σ_d ∂x[k, p·D + d]`."""
    K, D, P = sizes.child_dim, sizes.parent_dim, sizes.rows
    for k in range(K if width == D else 0):
        total = row(dx, k * width)
        for n in range(LANE, width, LANE):
            total = plus(total, row(dx, k * width + n))
        put(du, o + k, get(du, o + k) + sum_of(total))
    for p in range(0 if width == D else P):
        for k in range(K):
            part = dx.dtype.type(0)
            for n in range(k * width + p * D, k * width + (p + 1) * D):
                part += get(dx, n)
            put(du, o + p * K + k, get(du, o + p * K + k) + part)


@compiled
def count_matrices(dweight, sums, terms_of_kind, kind, first, degree, samples, count):
    """Count the terms of a group, and add to the gradients those partial sums that are full."""
    for e in range(first, first + degree):
        m = np.int64(kind[e])
        sums.terms[m] += samples
        if sums.terms[m] >= terms_of_kind[m]:
            _add_matrix(dweight, sums, m, count)


@compiled
def add_matrices(dweight, sums, count):
    """Add the partial sums that are left to the gradients of all matrices, of `count` numbers."""
    for m in range(len(sums.terms)):
        if sums.terms[m]:
            _add_matrix(dweight, sums, m, count)


@inlined
def _add_matrix(dweight, sums, m, count):
    _move(dweight, m * count, sums.weight, m * count, count)
    sums.terms[m] = 0
