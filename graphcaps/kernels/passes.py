"""Poses of a block of samples, matrices and edges enter; one pass over the edges sums into arrays.

The last dimension of poses and of parents' features is the *lanes*: as many samples side by side as
`lanes` is long. Every loop ends in one over the lanes, so all arithmetic is that of whole vectors
and none goes across one, whatever K, D and the degrees are. A pass walks from child to child; the
votes of one child, for one block of samples, are all the votes that there ever are.

    u       [blocks, I, K, lanes]      V, q, s, H    [blocks, J, D, lanes]
    weight  [M, K, D]                  start, parent, kind    edges sorted by child
    scratch                            what a thread works in; it may hold anything

Arrays that a function writes lie apart from those that it reads.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.extending import intrinsic, overload


class _Apart(CompilerBase):
    """Tells LLVM that arguments do not overlap; else each loop over lanes asks that first."""

    def define_pipelines(self) -> list:
        self.state.flags.noalias = True
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


def _compiled(fastmath: set[str]) -> Callable:
    """Compile on the first call, without the lock on Python, and keep that on disk if possible."""

    def decorate(function: Callable) -> Callable:
        options: dict[str, Any] = dict(fastmath=fastmath, nogil=True, error_model="numpy")
        try:
            return njit(cache=True, pipeline_class=_Apart, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            return njit(pipeline_class=_Apart, **options)(function)

    return decorate


TERMS = 32  # summed apart, so that a long sum in float32 does not lose what it adds

# Sums may be taken in any order; NaN and infinity stay what they are.
compiled = _compiled({"contract", "reassoc"})
in_order = _compiled({"contract"})


@compiled
def lay_in_lanes(x, out):
    """`[B, n, d]` to `[blocks, n, d, lanes]`, with zeros in the lanes without a sample."""
    for block in range(out.shape[0]):
        first = block * out.shape[3]
        samples = min(out.shape[3], x.shape[0] - first)
        for row in range(x.shape[1]):
            for n in range(samples):
                for d in range(x.shape[2]):
                    out[block, row, d, n] = x[first + n, row, d]
            for d in range(x.shape[2]):
                out[block, row, d, samples:] = 0


@compiled
def lay_in_samples(x, out):
    """`[blocks, n, d, lanes]` to `[B, n, d]`."""
    for block in range(x.shape[0]):
        for row in range(x.shape[1]):
            _lay_row(x[block, row], block, out[:, row])


@compiled
def sum_votes(u, weight, edges, children, V, uniform, lanes, scratch, s):
    """`s_j += Σ c_e û_e` with `c` the softmax over a child's edges of `û · V`, or uniform."""
    start, parent, kind = edges
    votes, logits, row, sums, _ = scratch
    u_hat, c = votes[0], logits[0]
    group = _children_of_a_sum(start, s.shape[1])
    for block in range(u.shape[0]):
        for begin in range(children[0], children[1], group):
            sums[:] = 0
            for i in range(begin, min(begin + group, children[1])):
                first, degree = start[i], start[i + 1] - start[i]
                _votes(u[block, i], weight, kind[first:], degree, lanes, u_hat)
                _coupling(u_hat, V[block], parent[first:], degree, uniform, lanes, row, c)
                for e in range(degree):
                    _add_scaled(sums[parent[first + e]], c[e], u_hat[e], lanes)
            _add(s[block], sums)


@compiled
def sum_logit_gradients(u, weight, edges, children, V, q, lanes, scratch, H):
    """`H_j += Σ l_e û_e` with `l` the gradient of the logits `û · V`, from `q`, that of s."""
    start, parent, kind = edges
    votes, logits, row, sums, _ = scratch
    u_hat, c, gradient = votes[0], logits[0], logits[1]
    group = _children_of_a_sum(start, H.shape[1])
    for block in range(u.shape[0]):
        for begin in range(children[0], children[1], group):
            sums[:] = 0
            for i in range(begin, min(begin + group, children[1])):
                first, degree = start[i], start[i + 1] - start[i]
                if degree < 2:
                    continue  # all of its coupling is with one parent, whatever the logit
                ends = parent[first:]
                _votes(u[block, i], weight, kind[first:], degree, lanes, u_hat)
                _coupling(u_hat, V[block], ends, degree, False, lanes, row, c)
                _logit_gradients(u_hat, q[block], ends, degree, c, lanes, row, gradient)
                for e in range(degree):
                    _add_scaled(sums[ends[e]], gradient[e], u_hat[e], lanes)
            _add(H[block], sums)


@compiled
def add_gradients(
    u, weight, edges, children, V, q, rounds, through_logits, lanes, scratch, du, dweight
):
    """`∂û_e = Σ_r (c^r_e q^r + l^r_e V_{r-1})`, and from it `∂u += W ∂û` and `∂W += u ⊗ ∂û`.

    `rounds` are the first and one past the last; `V[r − 1]` goes with `q[r]`, and there is none
    for the first iteration, where V is 0. Without `through_logits`, l counts as 0. `du` is written
    to, as `[B, I, K]`; an empty one, or an empty `dweight`, is left out.
    """
    start, parent, kind = edges
    votes, logits, row, _, poses = scratch
    u_hat, du_hat, c, gradient = votes[0], votes[1], logits[0], logits[1]
    du_i, du_part = poses[0], poses[1]
    for block in range(u.shape[0]):
        for i in range(children[0], children[1]):
            first, degree = start[i], start[i + 1] - start[i]
            ends, kinds = parent[first:], kind[first:]
            _votes(u[block, i], weight, kinds, degree, lanes, u_hat)
            du_hat[:degree] = 0
            for r in range(rounds[0], rounds[1]):
                V_before = V[max(r - 1, 0), block]  # of r = 0 nothing is read
                _coupling(u_hat, V_before, ends, degree, r == 0, lanes, row, c)
                if through_logits and r > 0 and degree > 1:
                    _logit_gradients(u_hat, q[r, block], ends, degree, c, lanes, row, gradient)
                    for e in range(degree):
                        _add_scaled(du_hat[e], gradient[e], V_before[ends[e]], lanes)
                for e in range(degree):
                    _add_scaled(du_hat[e], c[e], q[r, block, ends[e]], lanes)
            if dweight.size:
                for e in range(degree):
                    _add_outer(dweight[kinds[e]], u[block, i], du_hat[e], lanes)
            if du.size:
                du_i[:] = 0
                for begin in range(0, degree, TERMS):
                    du_part[:] = 0
                    for e in range(begin, min(begin + TERMS, degree)):
                        _add_product(du_part, weight[kinds[e]].T, du_hat[e], lanes)
                    _add(du_i, du_part)
                _lay_row(du_i, block, du[:, i])


@compiled
def _lay_row(x, block, out):
    """`[d, lanes]` to `[B, d]`, to the samples of one block."""
    first = block * x.shape[1]
    for n in range(min(x.shape[1], out.shape[0] - first)):
        for d in range(x.shape[0]):
            out[first + n, d] = x[d, n]


@compiled
def _children_of_a_sum(start, parents):
    """How many children are summed apart: enough that adding their sum costs little beside it."""
    children, edges = len(start) - 1, max(start[-1], 1)
    return TERMS + 4 * parents * children // edges


@compiled
def _add(out, x):
    to, values = out.reshape(-1), x.reshape(-1)
    for n in range(len(to)):
        to[n] += values[n]


@compiled
def _votes(u, weight, kind, degree, lanes, u_hat):
    u_hat[:degree] = 0
    for e in range(degree):
        _add_product(u_hat[e], weight[kind[e]], u, lanes)


@compiled
def _coupling(u_hat, V, parent, degree, uniform, lanes, row, c):
    """The softmax of `û · V` over the edges of one child, or that of equal logits."""
    if uniform or degree == 1:
        c[:degree] = 1 / degree
        return
    largest, total = row[0], row[1]
    for e in range(degree):
        _dot(c[e], u_hat[e], V[parent[e]], lanes)
    largest[:] = c[0]
    for e in range(1, degree):
        for n in range(16 * len(lanes)):
            largest[n] = c[e, n] if c[e, n] > largest[n] else largest[n]
    total[:] = 0
    for e in range(degree):
        _exponential(c[e], largest, total, lanes)
    for n in range(16 * len(lanes)):
        total[n] = 1 / total[n]
    for e in range(degree):
        for n in range(16 * len(lanes)):
            c[e, n] *= total[n]


@compiled
def _logit_gradients(u_hat, q, parent, degree, c, lanes, row, gradient):
    """`l_e = c_e (a_e − Σ c a)` with `a_e = û_e · q`."""
    mean = row[0]
    mean[:] = 0
    for e in range(degree):
        _dot(gradient[e], u_hat[e], q[parent[e]], lanes)
        for n in range(16 * len(lanes)):
            mean[n] += c[e, n] * gradient[e, n]
    for e in range(degree):
        for n in range(16 * len(lanes)):
            gradient[e, n] = c[e, n] * (gradient[e, n] - mean[n])


@compiled
def _add_product(out, matrix, x, lanes):
    """`out[a] += Σ_b matrix[b, a] x[b]`, eight b at a time so that `out` stays in registers."""
    rows, b = matrix.shape[0], 0
    while b + 8 <= rows:
        for a in range(matrix.shape[1]):
            m0, m1, m2, m3 = matrix[b, a], matrix[b + 1, a], matrix[b + 2, a], matrix[b + 3, a]
            m4, m5, m6, m7 = matrix[b + 4, a], matrix[b + 5, a], matrix[b + 6, a], matrix[b + 7, a]
            for n in range(16 * len(lanes)):
                out[a, n] += (
                    m0 * x[b, n] + m1 * x[b + 1, n] + m2 * x[b + 2, n] + m3 * x[b + 3, n]
                ) + (m4 * x[b + 4, n] + m5 * x[b + 5, n] + m6 * x[b + 6, n] + m7 * x[b + 7, n])
        b += 8
    while b < rows:
        for a in range(matrix.shape[1]):
            m0 = matrix[b, a]
            for n in range(16 * len(lanes)):
                out[a, n] += m0 * x[b, n]
        b += 1


@compiled
def _dot(out, x, y, lanes):
    """`out = Σ_d x[d] y[d]`, four d at a time."""
    out[:] = 0
    rows, d = x.shape[0], 0
    while d + 4 <= rows:
        for n in range(16 * len(lanes)):
            out[n] += (x[d, n] * y[d, n] + x[d + 1, n] * y[d + 1, n]) + (
                x[d + 2, n] * y[d + 2, n] + x[d + 3, n] * y[d + 3, n]
            )
        d += 4
    while d < rows:
        for n in range(16 * len(lanes)):
            out[n] += x[d, n] * y[d, n]
        d += 1


@compiled
def _add_scaled(out, scale, x, lanes):
    """`out[d] += scale · x[d]`, four d at a time."""
    rows, d = x.shape[0], 0
    while d + 4 <= rows:
        for n in range(16 * len(lanes)):
            factor = scale[n]
            out[d, n] += factor * x[d, n]
            out[d + 1, n] += factor * x[d + 1, n]
            out[d + 2, n] += factor * x[d + 2, n]
            out[d + 3, n] += factor * x[d + 3, n]
        d += 4
    while d < rows:
        for n in range(16 * len(lanes)):
            out[d, n] += scale[n] * x[d, n]
        d += 1


@compiled
def _add_outer(out, x, y, lanes):
    """`out[k, d] += Σ_n x[k, n] y[d, n]`: the one sum across the lanes."""
    for k in range(x.shape[0]):
        columns, d = y.shape[0], 0
        while d + 4 <= columns:
            t0 = t1 = t2 = t3 = out.dtype.type(0)
            for n in range(16 * len(lanes)):
                t0 += x[k, n] * y[d, n]
                t1 += x[k, n] * y[d + 1, n]
                t2 += x[k, n] * y[d + 2, n]
                t3 += x[k, n] * y[d + 3, n]
            out[k, d] += t0
            out[k, d + 1] += t1
            out[k, d + 2] += t2
            out[k, d + 3] += t3
            d += 4
        while d < columns:
            t0 = out.dtype.type(0)
            for n in range(16 * len(lanes)):
                t0 += x[k, n] * y[d, n]
            out[k, d] += t0
            d += 1


@in_order
def _exponential(b, largest, total, lanes):
    """`b = exp(b − largest)`, and the same added to `total`."""
    for n in range(16 * len(lanes)):
        b[n] = exp_below_0(b[n] - largest[n])
        total[n] += b[n]


def exp_below_0(x):
    """`exp x` for x ≤ 0; NaN gives NaN. In float32 within 2 units and without a call."""
    raise NotImplementedError("for compiled code alone")


@overload(exp_below_0, jit_options=dict(fastmath={"contract"}))
def _exp_below_0(x):
    if x == types.float32:
        return _exp_of_float32
    return lambda x: math.exp(x)  # noqa: PLW0108, numba wants a function of Python


LOG2_E = np.float32(1 / math.log(2))
LN_2_HIGH = np.float32(0.693359375)  # few digits, so that its multiples are exact
LN_2_LOW = np.float32(math.log(2) - 0.693359375)
ROUNDER = np.float32(1.5 * 2**23)  # added and taken away, it leaves the nearest integer
SMALLEST = np.float32(-87)  # below, the result is that of −87, 2e-38
C2, C3, C4, C5, C6, C7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))
ONE = np.float32(1)


def _exp_of_float32(x):
    # exp x = 2^k exp r, |r| ≤ ln 2 / 2, where eight terms of the series are enough
    x = SMALLEST if x < SMALLEST else x  # NaN stays
    shifted = x * LOG2_E + ROUNDER
    k = shifted - ROUNDER
    r = x - k * LN_2_HIGH - k * LN_2_LOW
    series = ONE + r * (ONE + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * (C6 + r * C7))))))
    return series * _power_of_2(shifted)  # type: ignore[call-arg]


@intrinsic
def _power_of_2(typingctx, shifted):
    """`2^k` in float32 from `k + ROUNDER`: the last bits of that are k, the exponent's bits."""

    def build(context, builder, signature, args):
        int32 = context.get_value_type(types.int32)
        bits = builder.shl(builder.bitcast(args[0], int32), int32(23))
        bits = builder.add(bits, int32(127 << 23))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(types.float32), build
