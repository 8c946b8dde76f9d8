"""Elementwise loops over lanes, from which the passes over the edges are built.

A *row* is one number per lane, and each lane holds one sample. There are 16 lanes for each entry of
the tuple `lanes`; its length is part of its type, so loop bounds are known at compile time. Arrays
are flat and indexed by row. Only `add_outer` and `sum_lanes` sum across lanes.

The rows that a function writes must not overlap those that it reads.
"""

import math

import numpy as np
from numba import types
from numba.extending import overload

from graphcaps.kernels.cpu.compiled import (
    compiled,
    entry,
    inlined,
    inlined_in_order,
    intrinsic,
)
from graphcaps.kernels.cpu.vectors import add_four_sums, plus, spread, sum_of, times
from graphcaps.kernels.cpu.vectors import put_row as put_vector
from graphcaps.kernels.cpu.vectors import row as vector


@intrinsic
def get(typingctx, x, i):
    """Element i of an array.

    Indexing would check for a negative i at every element, which keeps LLVM from vectorizing.
    """

    def build(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [args[1]], inbounds=True))

    return x.dtype(x, i), build


@intrinsic
def put(typingctx, x, i, value):
    """Write element i of an array."""

    def build(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        builder.store(args[2], builder.gep(data, [args[1]], inbounds=True))
        return context.get_dummy_value()

    return types.void(x, i, x.dtype), build


@inlined
def blocks_of(samples, lanes):
    """The number of blocks that hold the samples."""
    return (samples + 16 * len(lanes) - 1) // (16 * len(lanes))


@entry
def lay_in_lanes(x, samples, nodes, d, out, lanes):
    """Transpose `[B, n, d]` to `[blocks, n, d, lanes]`, with zeros in lanes without a sample."""
    for block in range(blocks_of(samples, lanes)):
        for i in range(nodes):
            lay_node_in_lanes(x, samples, nodes, block, i, d, out, (block * nodes + i) * d, lanes)


@entry
def lay_in_samples(x, samples, nodes, d, out, lanes):
    """Transpose `[blocks, n, d, lanes]` to `[B, n, d]`."""
    for block in range(blocks_of(samples, lanes)):
        for i in range(nodes):
            row = (block * nodes + i) * d
            lay_node_in_samples(x, row, samples, nodes, block, i, d, out, lanes)


@compiled
def lay_node_in_lanes(x, samples, nodes, block, node, d, out, row, lanes):
    """Transpose the numbers of one node for one block of samples, from `[B, n, d]` to d rows."""
    L = 16 * len(lanes)
    o, there = row * L, min(L, samples - block * L)
    for n in range(there):
        i = ((block * L + n) * nodes + node) * d
        for column in range(d):
            put(out, o + column * L + n, get(x, i + column))
    for column in range(d):
        for n in range(there, L):
            put(out, o + column * L + n, x.dtype.type(0))


@compiled
def lay_node_in_samples(x, row, samples, nodes, block, node, d, out, lanes):
    """Transpose d rows to the numbers of one node in `[B, n, d]`."""
    L = 16 * len(lanes)
    i, there = row * L, min(L, samples - block * L)
    for n in range(there):
        o = ((block * L + n) * nodes + node) * d
        for column in range(d):
            put(out, o + column, get(x, i + column * L + n))


@inlined
def fill(out, o, value, count, lanes):
    """`out[d] = value` for `count` rows."""
    L = 16 * len(lanes)
    for n in range(o * L, (o + count) * L):
        put(out, n, value)


@inlined
def copy(out, o, x, i, count, lanes):
    """`out[d] = x[d]`."""
    L = 16 * len(lanes)
    for n in range(count * L):
        put(out, o * L + n, get(x, i * L + n))


@inlined
def copy_negative(out, o, x, i, count, lanes):
    """`out[d] = −x[d]`."""
    L = 16 * len(lanes)
    for n in range(count * L):
        put(out, o * L + n, -get(x, i * L + n))


@inlined
def add(out, o, x, i, count, lanes):
    """`out[d] += x[d]`."""
    L = 16 * len(lanes)
    for n in range(count * L):
        put(out, o * L + n, get(out, o * L + n) + get(x, i * L + n))


@inlined
def add_number(out, o, number, lanes):
    """`out += number`, one row."""
    L = 16 * len(lanes)
    for n in range(o * L, (o + 1) * L):
        put(out, n, get(out, n) + number)


@inlined
def maximum(out, o, x, i, lanes):
    """`out = max(out, x)`, one row; NaN in x is ignored."""
    L = 16 * len(lanes)
    for n in range(L):
        found, other = get(out, o * L + n), get(x, i * L + n)
        put(out, o * L + n, other if other > found else found)


@inlined
def multiply(out, o, x, i, lanes):
    """`out *= x`, one row."""
    L = 16 * len(lanes)
    for n in range(L):
        put(out, o * L + n, get(out, o * L + n) * get(x, i * L + n))


@inlined
def invert(out, o, lanes):
    """`out = 1 / out`, one row."""
    L = 16 * len(lanes)
    for n in range(o * L, (o + 1) * L):
        put(out, n, out.dtype.type(1) / get(out, n))


@inlined
def subtract_and_multiply(out, o, x, i, y, j, lanes):
    """`out = (out − x) y`, one row."""
    L = 16 * len(lanes)
    for n in range(L):
        put(out, o * L + n, (get(out, o * L + n) - get(x, i * L + n)) * get(y, j * L + n))


@inlined
def sum_lanes(x, i, lanes):
    """The sum of one row."""
    L = 16 * len(lanes)
    total = x.dtype.type(0)
    for n in range(i * L, (i + 1) * L):
        total += get(x, n)
    return total


@compiled
def add_product(out, o, matrix, m, inner, outer, down, across, x, i, rows, there, lanes):
    """`out[a] += Σ_b matrix[b, a] x[b]` for each row of a pose; `out` counts as 0 unless `there`.

    `matrix` is `[inner, outer]`, starts at element m, and has strides `down` and `across`. Sums of
    four a and up to 32 lanes stay in registers over all b.
    """
    L = 16 * len(lanes)
    for row in range(rows):
        first, o0 = (i + row * inner) * L, (o + row * outer) * L
        for a in range(0, outer - 3, 4):
            at, m0 = o0 + a * L, m + a * across
            for n in range(0, L - 16, 32):
                _add_to_four_by_two(
                    out, at + n, L, matrix, m0, inner, down, across, x, first + n, there
                )
            if L % 32:
                n = L - 16
                _add_to_four(out, at + n, L, matrix, m0, inner, down, across, x, first + n, there)
        for a in range(outer - outer % 4, outer):
            for n in range(0, L, 16):
                at = o0 + a * L + n
                total = vector(out, at) if there else spread(out.dtype.type(0))
                for b in range(inner):
                    weight = spread(get(matrix, m + a * across + b * down))
                    total = plus(total, times(weight, vector(x, first + n + b * L)))
                put_vector(out, at, total)


@inlined
def _add_to_four_by_two(out, o, L, matrix, m, inner, down, across, x, i, there):
    """Four numbers for 32 lanes: the first is at element o of `out`, the others L further each."""
    o1, o2, o3 = o + L, o + 2 * L, o + 3 * L
    t0 = t1 = t2 = t3 = s0 = s1 = s2 = s3 = spread(out.dtype.type(0))
    if there:
        t0, t1, t2, t3 = vector(out, o), vector(out, o1), vector(out, o2), vector(out, o3)
        s0, s1 = vector(out, o + 16), vector(out, o1 + 16)
        s2, s3 = vector(out, o2 + 16), vector(out, o3 + 16)
    for b in range(inner):
        x0, x1 = vector(x, i + b * L), vector(x, i + b * L + 16)
        m0 = m + b * down
        weight = spread(get(matrix, m0))
        t0, s0 = plus(t0, times(weight, x0)), plus(s0, times(weight, x1))
        weight = spread(get(matrix, m0 + across))
        t1, s1 = plus(t1, times(weight, x0)), plus(s1, times(weight, x1))
        weight = spread(get(matrix, m0 + 2 * across))
        t2, s2 = plus(t2, times(weight, x0)), plus(s2, times(weight, x1))
        weight = spread(get(matrix, m0 + 3 * across))
        t3, s3 = plus(t3, times(weight, x0)), plus(s3, times(weight, x1))
    put_vector(out, o, t0)
    put_vector(out, o + 16, s0)
    put_vector(out, o1, t1)
    put_vector(out, o1 + 16, s1)
    put_vector(out, o2, t2)
    put_vector(out, o2 + 16, s2)
    put_vector(out, o3, t3)
    put_vector(out, o3 + 16, s3)


@inlined
def _add_to_four(out, o, L, matrix, m, inner, down, across, x, i, there):
    """The same for 16 lanes."""
    o1, o2, o3 = o + L, o + 2 * L, o + 3 * L
    t0 = t1 = t2 = t3 = spread(out.dtype.type(0))
    if there:
        t0, t1, t2, t3 = vector(out, o), vector(out, o1), vector(out, o2), vector(out, o3)
    for b in range(inner):
        x0, m0 = vector(x, i + b * L), m + b * down
        t0 = plus(t0, times(spread(get(matrix, m0)), x0))
        t1 = plus(t1, times(spread(get(matrix, m0 + across)), x0))
        t2 = plus(t2, times(spread(get(matrix, m0 + 2 * across)), x0))
        t3 = plus(t3, times(spread(get(matrix, m0 + 3 * across)), x0))
    put_vector(out, o, t0)
    put_vector(out, o1, t1)
    put_vector(out, o2, t2)
    put_vector(out, o3, t3)


@compiled
def add_outer(out, m, inner, outer, x, i, y, j, rows, lanes):
    """`out[b, a] += Σ x[b] y[a]`, summed over the rows of a pose and over the lanes.

    `out` is `[inner, outer]` and starts at element m. Sums of two b and four a stay in registers
    over all rows and lanes.
    """
    L = 16 * len(lanes)
    for a in range(0, outer - 3, 4):
        for b in range(0, inner - 1, 2):
            t0 = t1 = t2 = t3 = s0 = s1 = s2 = s3 = spread(x.dtype.type(0))
            for row in range(rows):
                i0, j0 = (i + row * inner + b) * L, (j + row * outer + a) * L
                for n in range(0, L, 16):
                    x0, x1 = vector(x, i0 + n), vector(x, i0 + L + n)
                    y0, y1 = vector(y, j0 + n), vector(y, j0 + L + n)
                    y2, y3 = vector(y, j0 + 2 * L + n), vector(y, j0 + 3 * L + n)
                    t0, s0 = plus(t0, times(x0, y0)), plus(s0, times(x1, y0))
                    t1, s1 = plus(t1, times(x0, y1)), plus(s1, times(x1, y1))
                    t2, s2 = plus(t2, times(x0, y2)), plus(s2, times(x1, y2))
                    t3, s3 = plus(t3, times(x0, y3)), plus(s3, times(x1, y3))
            add_four_sums(out, m + b * outer + a, t0, t1, t2, t3)
            add_four_sums(out, m + (b + 1) * outer + a, s0, s1, s2, s3)
    for b in range(inner):
        paired = b < inner - inner % 2
        for a in range(outer - outer % 4 if paired else 0, outer):
            total = spread(x.dtype.type(0))
            for row in range(rows):
                i0, j0 = (i + row * inner + b) * L, (j + row * outer + a) * L
                for n in range(0, L, 16):
                    total = plus(total, times(vector(x, i0 + n), vector(y, j0 + n)))
            m0 = m + b * outer + a
            put(out, m0, get(out, m0) + sum_of(total))


@inlined
def add_dot(out, o, x, i, y, j, count, lanes):
    """`out += Σ_d x[d] y[d]`, one row; unrolled over four d."""
    L = 16 * len(lanes)
    for n in range(0, L, 16):
        total = vector(out, o * L + n)
        for d in range(0, count - 3, 4):
            i0, j0 = (i + d) * L + n, (j + d) * L + n
            t0 = times(vector(x, i0), vector(y, j0))
            t1 = times(vector(x, i0 + L), vector(y, j0 + L))
            t2 = times(vector(x, i0 + 2 * L), vector(y, j0 + 2 * L))
            t3 = times(vector(x, i0 + 3 * L), vector(y, j0 + 3 * L))
            total = plus(total, plus(plus(t0, t1), plus(t2, t3)))
        for d in range(count - count % 4, count):
            total = plus(total, times(vector(x, (i + d) * L + n), vector(y, (j + d) * L + n)))
        put_vector(out, o * L + n, total)


@inlined
def add_squares(out, o, x, i, y, j, count, lanes):
    """`out += Σ_d x[d] y[d]²`, one row; unrolled over four d."""
    L = 16 * len(lanes)
    for d in range(0, count - 3, 4):
        i0, j0 = (i + d) * L, (j + d) * L
        for n in range(L):
            y0, y1 = get(y, j0 + n), get(y, j0 + L + n)
            y2, y3 = get(y, j0 + 2 * L + n), get(y, j0 + 3 * L + n)
            t0, t1 = get(x, i0 + n) * y0 * y0, get(x, i0 + L + n) * y1 * y1
            t2, t3 = get(x, i0 + 2 * L + n) * y2 * y2, get(x, i0 + 3 * L + n) * y3 * y3
            put(out, o * L + n, get(out, o * L + n) + ((t0 + t1) + (t2 + t3)))
    for d in range(count - count % 4, count):
        i0, j0 = (i + d) * L, (j + d) * L
        for n in range(L):
            y0 = get(y, j0 + n)
            put(out, o * L + n, get(out, o * L + n) + get(x, i0 + n) * y0 * y0)


@inlined
def scale(out, o, w, e, x, i, count, lanes):
    """`out[d] = w · x[d]`."""
    L = 16 * len(lanes)
    for d in range(count):
        o0, i0 = (o + d) * L, (i + d) * L
        for n in range(0, L, 16):
            put_vector(out, o0 + n, times(vector(w, e * L + n), vector(x, i0 + n)))


@inlined
def add_two_scaled(out, o, w, e, x, i, v, f, y, j, count, lanes):
    """`out[d] += w · x[d] + v · y[d]`."""
    L = 16 * len(lanes)
    for d in range(count):
        o0, i0, j0 = (o + d) * L, (i + d) * L, (j + d) * L
        for n in range(0, L, 16):
            first = times(vector(w, e * L + n), vector(x, i0 + n))
            second = times(vector(v, f * L + n), vector(y, j0 + n))
            put_vector(out, o0 + n, plus(vector(out, o0 + n), plus(first, second)))


@inlined
def add_scaled(out, o, w, e, x, i, count, lanes):
    """`out[d] += w · x[d]`, unrolled over four d."""
    L = 16 * len(lanes)
    for d in range(0, count - 3, 4):
        o0, i0 = (o + d) * L, (i + d) * L
        o1, o2, o3 = o0 + L, o0 + 2 * L, o0 + 3 * L
        i1, i2, i3 = i0 + L, i0 + 2 * L, i0 + 3 * L
        for n in range(L):
            factor = get(w, e * L + n)
            put(out, o0 + n, get(out, o0 + n) + factor * get(x, i0 + n))
            put(out, o1 + n, get(out, o1 + n) + factor * get(x, i1 + n))
            put(out, o2 + n, get(out, o2 + n) + factor * get(x, i2 + n))
            put(out, o3 + n, get(out, o3 + n) + factor * get(x, i3 + n))
    for d in range(count - count % 4, count):
        o0, i0 = (o + d) * L, (i + d) * L
        for n in range(L):
            put(out, o0 + n, get(out, o0 + n) + get(w, e * L + n) * get(x, i0 + n))


@inlined
def add_scaled_with_squares(out, squares, o, w, e, x, i, count, lanes):
    """`out[d] += w · x[d]` and `squares[d] += w · x[d]²`."""
    L = 16 * len(lanes)
    for d in range(count):
        o0, i0 = (o + d) * L, (i + d) * L
        for n in range(L):
            x0 = get(x, i0 + n)
            t0 = get(w, e * L + n) * x0
            put(out, o0 + n, get(out, o0 + n) + t0)
            put(squares, o0 + n, get(squares, o0 + n) + t0 * x0)


@inlined
def add_slopes(out, o, w, e, x, i, y, j, count, lanes):
    """`out[d] += 2 w · x[d] y[d]`."""
    L = 16 * len(lanes)
    for d in range(count):
        o0, i0, j0 = (o + d) * L, (i + d) * L, (j + d) * L
        for n in range(L):
            slope = get(w, e * L + n) * get(x, i0 + n) * get(y, j0 + n)
            put(out, o0 + n, get(out, o0 + n) + (slope + slope))


@inlined_in_order
def exponential(b, i, largest, at, total, o, lanes):
    """`b = exp(b − largest)` and `total += b`, one row."""
    L = 16 * len(lanes)
    for n in range(L):
        power = exp_below_0(get(b, i * L + n) - get(largest, at * L + n))
        put(b, i * L + n, power)
        put(total, o * L + n, get(total, o * L + n) + power)


def exp_below_0(x):
    """`exp x` for x ≤ 0; NaN gives NaN. In float32 within 2 ulp and without a function call."""
    raise NotImplementedError("for compiled code only")


@overload(exp_below_0, jit_options=dict(fastmath={"contract"}))
def _exp_below_0(x):
    if x == types.float32:
        return _exp_of_float32
    return lambda x: math.exp(x)  # noqa: PLW0108, numba wants a function of Python


LOG2_E = np.float32(1 / math.log(2))
LN_2_HIGH = np.float32(0.693359375)  # so few bits that its multiples are exact
LN_2_LOW = np.float32(math.log(2) - 0.693359375)
ROUNDER = np.float32(1.5 * 2**23)  # adding and subtracting it rounds to the nearest integer
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
    return series * _power_of_2(shifted)


@intrinsic
def _power_of_2(typingctx, shifted):
    """`2^k` in float32 from `k + ROUNDER`: its last bits, which are k, become the exponent."""

    def build(context, builder, signature, args):
        int32 = context.get_value_type(types.int32)
        bits = builder.shl(builder.bitcast(args[0], int32), int32(23))
        bits = builder.add(bits, int32(127 << 23))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(types.float32), build
