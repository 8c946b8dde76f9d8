"""Elementwise loops over lanes, from which the passes over the edges are built.

A *row* is one number per lane, and each lane holds one sample. There are 16 lanes for each entry of
the tuple `lanes`; its length is part of its type, so loop bounds are known at compile time. Arrays
are flat and indexed by row. Only `add_outer` and `sum_lanes` sum across lanes.

The rows that a function writes must not overlap those that it reads.
"""

from numba import types

from graphcaps.kernels.cpu.compiled import compiled, entry, inlined, intrinsic
from graphcaps.kernels.cpu.vectors import (
    add_four_sums,
    exp_below_0,
    larger,
    minus,
    plus,
    spread,
    sum_of,
    times,
)
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
    for n in range(o * L, (o + count) * L, 16):
        put_vector(out, n, spread(value))


@inlined
def copy(out, o, x, i, count, lanes):
    """`out[d] = x[d]`."""
    L = 16 * len(lanes)
    for n in range(0, count * L, 16):
        put_vector(out, o * L + n, vector(x, i * L + n))


@inlined
def copy_negative(out, o, x, i, count, lanes):
    """`out[d] = −x[d]`."""
    L = 16 * len(lanes)
    for n in range(0, count * L, 16):
        put_vector(out, o * L + n, minus(vector(x, i * L + n)))


@inlined
def add(out, o, x, i, count, lanes):
    """`out[d] += x[d]`."""
    L = 16 * len(lanes)
    for n in range(0, count * L, 16):
        put_vector(out, o * L + n, plus(vector(out, o * L + n), vector(x, i * L + n)))


@inlined
def add_number(out, o, number, lanes):
    """`out += number`, one row."""
    L = 16 * len(lanes)
    for n in range(o * L, (o + 1) * L, 16):
        put_vector(out, n, plus(vector(out, n), spread(number)))


@inlined
def maximum(out, o, x, i, lanes):
    """`out = max(out, x)`, one row; NaN in x is ignored."""
    L = 16 * len(lanes)
    for n in range(0, L, 16):
        put_vector(out, o * L + n, larger(vector(out, o * L + n), vector(x, i * L + n)))


@inlined
def multiply(out, o, x, i, lanes):
    """`out *= x`, one row."""
    L = 16 * len(lanes)
    for n in range(0, L, 16):
        put_vector(out, o * L + n, times(vector(out, o * L + n), vector(x, i * L + n)))


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
    for n in range(0, L, 16):
        difference = plus(vector(out, o * L + n), minus(vector(x, i * L + n)))
        put_vector(out, o * L + n, times(difference, vector(y, j * L + n)))


@inlined
def sum_lanes(x, i, lanes):
    """The sum of one row."""
    L = 16 * len(lanes)
    total = vector(x, i * L)
    for n in range(16, L, 16):
        total = plus(total, vector(x, i * L + n))
    return sum_of(total)


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
def add_products(out, o, x, i, y, j, lanes):
    """`out += x y`, one row."""
    L = 16 * len(lanes)
    for n in range(0, L, 16):
        product = times(vector(x, i * L + n), vector(y, j * L + n))
        put_vector(out, o * L + n, plus(vector(out, o * L + n), product))


@inlined
def add_squares(out, o, x, i, y, j, count, lanes):
    """`out += Σ_d x[d] y[d]²`, one row; unrolled over four d."""
    L = 16 * len(lanes)
    for n in range(0, L, 16):
        total = vector(out, o * L + n)
        for d in range(0, count - 3, 4):
            i0, j0 = (i + d) * L + n, (j + d) * L + n
            y0, y1 = vector(y, j0), vector(y, j0 + L)
            y2, y3 = vector(y, j0 + 2 * L), vector(y, j0 + 3 * L)
            t0 = times(times(vector(x, i0), y0), y0)
            t1 = times(times(vector(x, i0 + L), y1), y1)
            t2 = times(times(vector(x, i0 + 2 * L), y2), y2)
            t3 = times(times(vector(x, i0 + 3 * L), y3), y3)
            total = plus(total, plus(plus(t0, t1), plus(t2, t3)))
        for d in range(count - count % 4, count):
            y0 = vector(y, (j + d) * L + n)
            total = plus(total, times(times(vector(x, (i + d) * L + n), y0), y0))
        put_vector(out, o * L + n, total)


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
    """`out[d] += w · x[d]`."""
    L = 16 * len(lanes)
    for n in range(0, L, 16):
        factor = vector(w, e * L + n)
        for d in range(count):
            o0, i0 = (o + d) * L + n, (i + d) * L + n
            put_vector(out, o0, plus(vector(out, o0), times(factor, vector(x, i0))))


@inlined
def add_scaled_with_squares(out, squares, o, w, e, x, i, count, lanes):
    """`out[d] += w · x[d]` and `squares[d] += w · x[d]²`."""
    L = 16 * len(lanes)
    for n in range(0, L, 16):
        factor = vector(w, e * L + n)
        for d in range(count):
            o0, x0 = (o + d) * L + n, vector(x, (i + d) * L + n)
            term = times(factor, x0)
            put_vector(out, o0, plus(vector(out, o0), term))
            put_vector(squares, o0, plus(vector(squares, o0), times(term, x0)))


@inlined
def add_slopes(out, o, w, e, x, i, y, j, count, lanes):
    """`out[d] += 2 w · x[d] y[d]`."""
    L = 16 * len(lanes)
    for n in range(0, L, 16):
        factor = vector(w, e * L + n)
        factor = plus(factor, factor)
        for d in range(count):
            o0, i0, j0 = (o + d) * L + n, (i + d) * L + n, (j + d) * L + n
            slope = times(factor, times(vector(x, i0), vector(y, j0)))
            put_vector(out, o0, plus(vector(out, o0), slope))


@inlined
def exponential(b, i, largest, at, total, o, lanes):
    """`b = exp(b − largest)` and `total += b`, one row."""
    L = 16 * len(lanes)
    for n in range(0, L, 16):
        below = plus(vector(b, i * L + n), minus(vector(largest, at * L + n)))
        power = exp_below_0(below)
        put_vector(b, i * L + n, power)
        put_vector(total, o * L + n, plus(vector(total, o * L + n), power))
