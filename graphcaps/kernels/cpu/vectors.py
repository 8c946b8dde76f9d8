"""Vectors of 16 numbers for compiled code.

LLVM vectorizes long loops by itself, but unrolls a loop of 16 rounds into scalar instructions. The
functions here therefore use vector types explicitly.
"""

import math
import struct
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from graphcaps.kernels.cpu.by_pose import LANE
from graphcaps.kernels.cpu.compiled import intrinsic

FLAGS = ("contract", "reassoc")


class Vector(types.Type):
    """A vector of 16 numbers of one dtype."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        number = dmm.lookup(fe_type.dtype).get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(number, LANE))


def _pointer(
    context: Any, builder: Any, array_type: Any, array: Any, i: Any, count: int = LANE
) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    place = builder.gep(data, [i], inbounds=True)
    vector = ir.VectorType(context.get_value_type(array_type.dtype), count)
    return builder.bitcast(place, vector.as_pointer())


@intrinsic
def row(typingctx, x, i):
    """Load 16 numbers of an array, from element i on."""

    def build(context, builder, signature, args):
        place = _pointer(context, builder, signature.args[0], *args)
        return builder.load(place, align=x.dtype.bitwidth // 8)

    return Vector(x.dtype)(x, i), build


@intrinsic
def put_row(typingctx, x, i, vector):
    """Store 16 numbers in an array, from element i on."""

    def build(context, builder, signature, args):
        place = _pointer(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], place, align=x.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(x, i, Vector(x.dtype)), build


@intrinsic
def spread(typingctx, x):
    """A vector that repeats one number."""

    def build(context, builder, signature, args):
        vector = ir.VectorType(args[0].type, LANE)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), args[0], ir.IntType(32)(0))
        every = ir.Constant(ir.VectorType(ir.IntType(32), LANE), [0] * LANE)
        return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), every)

    return Vector(x)(x), build


@intrinsic
def plus(typingctx, x, y):
    """`x + y`."""

    def build(context, builder, signature, args):
        return builder.fadd(*args, flags=FLAGS)

    return x(x, y), build


@intrinsic
def times(typingctx, x, y):
    """`x y`."""

    def build(context, builder, signature, args):
        return builder.fmul(*args, flags=FLAGS)

    return x(x, y), build


@intrinsic
def minus(typingctx, x):
    """`−x`."""

    def build(context, builder, signature, args):
        return builder.fneg(args[0])

    return x(x), build


@intrinsic
def larger(typingctx, x, y):
    """The larger of x and y, lane by lane; NaN in y is ignored."""

    def build(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", args[1], args[0]), args[1], args[0])

    return x(x, y), build


LOG2_E = 1 / math.log(2)
LN_2_HIGH = 0.693359375  # so few bits that its multiples are exact in float32
LN_2_LOW = math.log(2) - LN_2_HIGH
ROUNDER = 1.5 * 2**23  # adding and subtracting it rounds to the nearest integer in float32
SMALLEST = -87  # below, the result is that of −87, 2e-38
SERIES = [1 / math.factorial(n) for n in range(8)]  # of exp r, |r| ≤ ln 2 / 2


@intrinsic
def exp_below_0(typingctx, x):
    """`exp x` for x ≤ 0; NaN gives NaN. In float32 within 2 ulp and without a function call."""

    def build(context, builder, signature, args):
        return _exp_of_float32(builder, *args)

    def build_by_calls(context, builder, signature, args):
        exp = context.get_function(math.exp, x.dtype(x.dtype))
        vector = args[0]
        for n in map(ir.IntType(32), range(LANE)):
            power = exp(builder, [builder.extract_element(args[0], n)])
            vector = builder.insert_element(vector, power, n)
        return vector

    return x(x), build if x.dtype == types.float32 else build_by_calls


def _exp_of_float32(builder: Any, x: Any) -> Any:
    """`exp x = 2^k exp r`; sums are in the order in which they are written."""
    integers = ir.VectorType(ir.IntType(32), LANE)

    def every(number: float) -> Any:
        return ir.Constant(x.type, [struct.unpack("f", struct.pack("f", number))[0]] * LANE)

    def multiplied_and_added(a: Any, b: Any, c: Any) -> Any:
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    small = builder.fcmp_ordered("<", x, every(SMALLEST))  # false for NaN, which stays
    x = builder.select(small, every(SMALLEST), x)
    shifted = multiplied_and_added(x, every(LOG2_E), every(ROUNDER))
    minus_k = builder.fsub(every(ROUNDER), shifted)
    r = multiplied_and_added(minus_k, every(LN_2_HIGH), x)
    r = multiplied_and_added(minus_k, every(LN_2_LOW), r)
    series = every(SERIES[-1])
    for coefficient in SERIES[-2::-1]:
        series = multiplied_and_added(series, r, every(coefficient))
    # 2^k: the last bits of `shifted`, which are k, become the exponent
    bits = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [23] * LANE))
    bits = builder.add(bits, ir.Constant(integers, [127 << 23] * LANE))
    return builder.fmul(series, builder.bitcast(bits, x.type))


def _folded(builder: Any, vector: Any, combine: Any) -> Any:
    """Reduce a vector to one number: combine its halves, then the halves of the result, etc."""
    size = LANE
    while size > 1:
        size //= 2
        none = ir.Constant(vector.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(
                vector,
                none,
                ir.Constant(ir.VectorType(ir.IntType(32), size), list(range(first, first + size))),
            )
            for first in (0, size)
        )
        vector = combine(low, high)
    return builder.extract_element(vector, ir.IntType(32)(0))


@intrinsic
def sum_of(typingctx, x):
    """The sum of 16 numbers."""

    def build(context, builder, signature, args):
        return _folded(builder, args[0], lambda a, b: builder.fadd(a, b, flags=FLAGS))

    return x.dtype(x), build


@intrinsic
def largest_of(typingctx, x):
    """The largest of 16 numbers."""

    def build(context, builder, signature, args):
        def larger_half(a, b):
            return builder.select(builder.fcmp_ordered(">", b, a), b, a)

        return _folded(builder, args[0], larger_half)

    return x.dtype(x), build


@intrinsic
def add_four_sums(typingctx, out, i, a, b, c, d):
    """Add the sums of four vectors to elements i to i + 3 of an array.

    Halves, then quarters, then eighths of the vectors are added side by side, which takes a third
    of the instructions of four sums, one after the other.
    """

    def build(context, builder, signature, args):
        def taken(a, b, lanes):
            numbers = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
            return builder.shuffle_vector(a, b, numbers)

        def folded(a, b, size):
            """The halves of each `size` numbers of a, and of b if it is there, added."""
            numbers = range(a.type.count if b is None else 2 * a.type.count)
            first = [n for n in numbers if n % size < size // 2]
            second = [n + size // 2 for n in first]
            b = ir.Constant(a.type, ir.Undefined) if b is None else b
            return builder.fadd(taken(a, b, first), taken(a, b, second), flags=FLAGS)

        w, x, y, z = args[2:]
        four = folded(folded(w, x, 16), folded(y, z, 16), 8)
        for size in (4, 2):
            four = folded(four, None, size)
        place = _pointer(context, builder, signature.args[0], args[0], args[1], four.type.count)
        align = out.dtype.bitwidth // 8
        before = builder.load(place, align=align)
        builder.store(builder.fadd(before, four, flags=FLAGS), place, align=align)
        return context.get_dummy_value()

    return types.void(out, i, a, b, c, d), build
