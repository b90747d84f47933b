"""Vectors of 256 bits as Numba values (`i8x32`, `i16x16`, `i32x8`, `f32x8`) and the few instructions that kernels need.

Everything is target-independent LLVM IR, which any CPU can run, apart from reading float16 and the integer products
(`products.py`): these have one definition per level of `level.py`. `plain` spells out what the others must compute,
lane for lane. What differs between levels takes the level as an argument (`emit_...`), so that tests can compile it for
CPUs that they do not run on. Addresses are plain integers (`array.ctypes.data` plus bytes); nothing here checks bounds.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from fewfire.kernels.level import LEVEL


class Vector(types.Type):
    """The Numba type of a SIMD register."""

    def __init__(self, name: str, element: ir.Type, lanes: int) -> None:
        self.llvm = ir.VectorType(element, lanes)
        super().__init__(name=f"fewfire.{name}")

    def __reduce__(self) -> Any:
        return _vector, (self.name.removeprefix("fewfire."),)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
i8x32 = Vector("i8x32", I8, 32)
i16x16 = Vector("i16x16", I16, 16)
i32x8 = Vector("i32x8", I32, 8)
f32x8 = Vector("f32x8", F32, 8)


def _vector(name: str) -> Vector:
    return {"i8x32": i8x32, "i16x16": i16x16, "i32x8": i32x8, "f32x8": f32x8}[name]


def instruction(result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Makes a Numba intrinsic from `emit(builder, *llvm_values) -> llvm_value`; scalars are cast to `arguments`.

    Its `emit` makes it a part of a longer one.
    """

    def wrap(emit: Callable[..., Any]) -> Any:
        signature = result(*arguments)

        def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> Any:
            returned = emit(builder, *values)
            return context.get_dummy_value() if result is types.void else returned

        forms = (
            lambda typing: (signature, codegen),
            lambda typing, a: (signature, codegen),
            lambda typing, a, b: (signature, codegen),
            lambda typing, a, b, c: (signature, codegen),
        )
        typed = forms[len(arguments)]
        typed.__name__ = typed.__qualname__ = emit.__name__
        typed.__doc__ = emit.__doc__
        made = intrinsic(typed)
        made.emit = emit
        return made

    return wrap


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    vector = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def constant(element: ir.Type, lanes: int, value: float) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


def invoke(builder: ir.IRBuilder, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [v.type for v in values]), name)
    return builder.call(function, values)


def load(builder: ir.IRBuilder, address: ir.Value, vector: ir.Type) -> ir.Value:
    return builder.load(builder.inttoptr(address, vector.as_pointer()), align=1)


def select_lanes(builder: ir.IRBuilder, vector: ir.Value, lanes: list[int]) -> ir.Value:
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _caller(result: types.Type, returned: ir.Type) -> Any:
    @intrinsic
    def call(typing, address, arguments):
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            unpacked = cgutils.unpack_tuple(builder, values[1])
            function = ir.FunctionType(returned, [value.type for value in unpacked])
            value = builder.call(builder.inttoptr(values[0], function.as_pointer()), unpacked)
            return context.get_dummy_value() if result is types.void else value

        return result(types.int64, arguments), codegen

    return call


# Calls the `Primitive` at an address with a tuple of numbers, records and arrays: one without a result, and one that
# returns an int64.
call, ask = _caller(types.void, ir.VoidType()), _caller(types.int64, I64)


# --- memory ---------------------------------------------------------------------------------------------------------


@instruction(i8x32, types.intp)
def load_i8x32(builder, address):
    """32 bytes at any alignment."""
    return load(builder, address, i8x32.llvm)


@instruction(f32x8, types.intp)
def load_f32x8(builder, address):
    """8 float32 at any alignment."""
    return load(builder, address, f32x8.llvm)


@instruction(types.void, types.intp, f32x8)
def store_f32x8(builder, address, value):
    """8 float32 at any alignment."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


@instruction(i16x16, types.intp)
def load_i16x16(builder, address):
    """16 int16 at any alignment."""
    return load(builder, address, i16x16.llvm)


@instruction(i16x16, types.intp)
def load_i8x16_as_i16(builder, address):
    """16 signed bytes, widened."""
    return builder.sext(load(builder, address, ir.VectorType(I8, 16)), i16x16.llvm)


@instruction(types.int64, types.intp)
def load_i64(builder, address):
    return load(builder, address, I64)


@instruction(types.void, types.intp, types.int64)
def store_i64(builder, address, value):
    builder.store(value, builder.inttoptr(address, I64.as_pointer()), align=1)


@instruction(types.int64, types.intp)
def load_i32(builder, address):
    return builder.sext(load(builder, address, I32), I64)


@instruction(types.void, types.intp, types.int64)
def store_i32(builder, address, value):
    builder.store(builder.trunc(value, I32), builder.inttoptr(address, I32.as_pointer()), align=1)


@instruction(types.float32, types.intp)
def load_f32(builder, address):
    return load(builder, address, F32)


@instruction(types.void, types.intp, types.float32)
def store_f32(builder, address, value):
    builder.store(value, builder.inttoptr(address, F32.as_pointer()), align=1)


@instruction(types.int8, types.intp)
def load_i8(builder, address):
    return load(builder, address, I8)


@instruction(types.void, types.intp, types.int64)
def store_i8(builder, address, value):
    builder.store(builder.trunc(value, I8), builder.inttoptr(address, I8.as_pointer()), align=1)


@instruction(f32x8, types.intp)
def splat_f32_at(builder, address):
    """All lanes equal to one float32 in memory."""
    return splat(builder, load(builder, address, F32), 8)


@instruction(f32x8, types.intp, types.intp)
def listed_f32x8(builder, base, ids):
    """8 float32 of an array, those that 8 int32 at any alignment list."""
    offsets = builder.shl(builder.sext(load(builder, ids, i32x8.llvm), ir.VectorType(I64, 8)), constant(I64, 8, 2))
    addresses = builder.inttoptr(builder.add(splat(builder, base, 8), offsets), ir.VectorType(F32.as_pointer(), 8))
    every, none = constant(ir.IntType(1), 8, 1), ir.Constant(f32x8.llvm, ir.Undefined)
    return invoke(builder, "llvm.masked.gather.v8f32.v8p0", f32x8.llvm, addresses, ir.Constant(I32, 4), every, none)


@instruction(types.void, types.intp, f32x8)
def store_rounded_i8x8(builder, address, value):
    """8 signed bytes, rounded to nearest even; the values must lie between -127 and 127."""
    rounded = invoke(builder, "llvm.rint.v8f32", f32x8.llvm, value)
    narrow = builder.trunc(builder.fptosi(rounded, i32x8.llvm), ir.VectorType(I8, 8))
    builder.store(narrow, builder.inttoptr(address, narrow.type.as_pointer()), align=1)


@instruction(types.void, types.intp)
def prefetch(builder, address):
    """Asks for a cache line that will be read soon."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    read, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    invoke(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, keep, data)


@instruction(types.void, types.intp, f32x8)
def store_rounded_i16x8(builder, address, value):
    """8 int16, rounded to nearest even; the values must lie between -32767 and 32767."""
    rounded = invoke(builder, "llvm.rint.v8f32", f32x8.llvm, value)
    narrow = builder.trunc(builder.fptosi(rounded, i32x8.llvm), ir.VectorType(I16, 8))
    builder.store(narrow, builder.inttoptr(address, narrow.type.as_pointer()), align=1)


@instruction(types.void, types.intp, types.intp)
def copy_4_bytes(builder, target, source):
    builder.store(load(builder, source, I32), builder.inttoptr(target, I32.as_pointer()), align=1)


@instruction(types.void, types.intp, types.intp)
def copy_8_bytes(builder, target, source):
    builder.store(load(builder, source, I64), builder.inttoptr(target, I64.as_pointer()), align=1)


@instruction(f32x8, types.intp)
def load_i8x8_as_f32(builder, address):
    """8 signed bytes, widened to float."""
    return builder.sitofp(load(builder, address, ir.VectorType(I8, 8)), f32x8.llvm)


@instruction(f32x8, types.intp)
def load_bf16x8(builder, address):
    """8 bfloat16, widened: they are the upper halves of float32."""
    wide = builder.zext(load(builder, address, ir.VectorType(I16, 8)), i32x8.llvm)
    return builder.bitcast(builder.shl(wide, constant(I32, 8, 16)), f32x8.llvm)


def emit_half_to_float(builder: ir.IRBuilder, level: str, halves: ir.Value) -> ir.Value:
    if level != "plain":
        return builder.fpext(builder.bitcast(halves, ir.VectorType(ir.HalfType(), 8)), f32x8.llvm)
    # Moves exponent and mantissa into place and multiplies by 2^(127-15): exact, subnormals too, and
    # needs no half-float support of the CPU. The sign goes along separately.
    wide = builder.zext(halves, i32x8.llvm)
    sign = builder.shl(builder.and_(wide, constant(I32, 8, 0x8000)), constant(I32, 8, 16))
    rest = builder.shl(builder.and_(wide, constant(I32, 8, 0x7FFF)), constant(I32, 8, 13))
    scaled = builder.fmul(builder.bitcast(rest, f32x8.llvm), constant(F32, 8, 2.0**112))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, i32x8.llvm), sign), f32x8.llvm)


def _half_loader(groups: int) -> Any:
    @instruction(f32x8, types.intp)
    def load_f16(builder, address):
        halves = load(builder, address, ir.VectorType(I16, groups))
        return emit_half_to_float(builder, LEVEL, select_lanes(builder, halves, [i * groups // 8 for i in range(8)]))

    return load_f16


load_f16x8 = _half_loader(8)  # 8 float16
load_f16x4 = _half_loader(4)  # 4 float16, each into two neighbouring lanes
load_f16x2 = _half_loader(2)  # 2 float16, each into four neighbouring lanes


def _float_to_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    bits = builder.bitcast(value, i32x8.llvm)
    sign = builder.and_(builder.lshr(bits, constant(I32, 8, 16)), constant(I32, 8, 0x8000))
    size = invoke(builder, "llvm.fabs.v8f32", f32x8.llvm, value)
    size = invoke(builder, "llvm.minnum.v8f32", f32x8.llvm, size, constant(F32, 8, 65504.0))
    small = builder.bitcast(builder.fmul(size, constant(F32, 8, 2.0**-112)), i32x8.llvm)
    odd = builder.and_(builder.lshr(small, constant(I32, 8, 13)), constant(I32, 8, 1))
    rounded = builder.lshr(builder.add(builder.add(small, odd), constant(I32, 8, 0xFFF)), constant(I32, 8, 13))
    return builder.trunc(builder.or_(rounded, sign), ir.VectorType(I16, 8))


@instruction(types.void, types.intp, f32x8)
def store_f16x8(builder, address, value):
    """8 float16, rounded to nearest even and clamped to their range (65504)."""
    halves = _float_to_half(builder, value)
    builder.store(halves, builder.inttoptr(address, halves.type.as_pointer()), align=1)


@instruction(f32x8, f32x8)
def round_to_f16(builder, value):
    """The float16 values nearest to these, as float32."""
    return emit_half_to_float(builder, LEVEL, _float_to_half(builder, value))


# --- arithmetic -----------------------------------------------------------------------------------------------------


@instruction(f32x8, types.float32)
def splat_f32(builder, value):
    """All lanes equal to a scalar."""
    return splat(builder, value, 8)


@instruction(i32x8)
def zeros_i32(builder):
    """All lanes zero."""
    return constant(I32, 8, 0)


@instruction(i32x8, i32x8, i32x8)
def add_i32(builder, a, b):
    return builder.add(a, b)


@instruction(f32x8, f32x8, f32x8, f32x8)
def fma(builder, a, b, c):
    """a * b + c, fused where the CPU can."""
    return invoke(builder, "llvm.fmuladd.v8f32", f32x8.llvm, a, b, c)


@instruction(f32x8, f32x8, f32x8)
def add(builder, a, b):
    return builder.fadd(a, b)


@instruction(f32x8, f32x8, f32x8)
def mul(builder, a, b):
    return builder.fmul(a, b)


@instruction(f32x8, f32x8, f32x8)
def subtract(builder, a, b):
    return builder.fsub(a, b)


@instruction(f32x8, f32x8, f32x8)
def divide(builder, a, b):
    return builder.fdiv(a, b)


@instruction(f32x8, f32x8, f32x8)
def maximum(builder, a, b):
    """The larger one; b where either is NaN, as on x86, where anything else takes three instructions."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@instruction(f32x8, f32x8, f32x8)
def minimum(builder, a, b):
    """The smaller one; b where either is NaN."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@instruction(f32x8, f32x8)
def absolute(builder, value):
    return invoke(builder, "llvm.fabs.v8f32", f32x8.llvm, value)


@instruction(f32x8, f32x8)
def rint(builder, value):
    """Rounded to the nearest integer, ties to even."""
    return invoke(builder, "llvm.rint.v8f32", f32x8.llvm, value)


@instruction(f32x8, f32x8, f32x8)
def where_over(builder, value, threshold):
    """Lanes over the threshold, zero elsewhere."""
    return builder.select(builder.fcmp_ordered(">", value, threshold), value, constant(F32, 8, 0.0))


@instruction(f32x8, f32x8, f32x8)
def where_beyond(builder, value, threshold):
    """Lanes whose absolute value is over the threshold, and NaN; zero elsewhere."""
    within = builder.fcmp_ordered("<=", absolute.emit(builder, value), threshold)
    return builder.select(within, constant(F32, 8, 0.0), value)


@instruction(f32x8, f32x8, f32x8)
def times_power_of_two(builder, value, exponent):
    """value * 2**exponent, by addition to the exponent bits; the result must be a normal number."""
    bits = builder.shl(builder.fptosi(exponent, i32x8.llvm), constant(I32, 8, 23))
    return builder.bitcast(builder.add(builder.bitcast(value, i32x8.llvm), bits), f32x8.llvm)


@instruction(i8x32)
def ones_i8(builder):
    """All bytes 1."""
    return constant(I8, 32, 1)


@instruction(types.float32, f32x8)
def max_lane(builder, value):
    """The largest of the 8 lanes."""
    for half in (4, 2, 1):
        low = select_lanes(builder, value, list(range(half)))
        high = select_lanes(builder, value, list(range(half, 2 * half)))
        value = invoke(builder, f"llvm.maxnum.v{half}f32", low.type, low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


@instruction(f32x8, i32x8)
def to_f32(builder, value):
    """int32 to float32, rounded to nearest."""
    return builder.sitofp(value, f32x8.llvm)


@instruction(f32x8, f32x8)
def swap_halves(builder, value):
    """Lanes 4 to 7, then 0 to 3."""
    return select_lanes(builder, value, [4, 5, 6, 7, 0, 1, 2, 3])


def _adder(first: list[int], second: list[int]) -> Any:
    """Makes an instruction that adds these lanes of a pair of registers (0 to 7, 8 to 15) to those."""

    @instruction(f32x8, f32x8, f32x8)
    def added(builder, a, b):
        one, other = (ir.Constant(ir.VectorType(I32, 8), lanes) for lanes in (first, second))
        return builder.fadd(builder.shuffle_vector(a, b, one), builder.shuffle_vector(a, b, other))

    return added


# Three steps that add up the lanes of eight registers together: [a's halves, b's halves], in each half [a's pairs,
# b's pairs], and in each half [a's two pairs of neighbours, b's]. The first two need one shuffle and a blend each.
add_halves = _adder([0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11])
add_pairs = _adder([0, 1, 10, 11, 4, 5, 14, 15], [2, 3, 8, 9, 6, 7, 12, 13])
add_neighbours = _adder([0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15])


@instruction(types.float32, f32x8)
def first_lane(builder, value):
    return builder.extract_element(value, ir.Constant(I32, 0))


@instruction(types.float32, f32x8)
def sum_lanes(builder, value):
    """Sum of the 8 lanes, halves first (the order is the same at every level)."""
    for half in (4, 2, 1):
        low = select_lanes(builder, value, list(range(half)))
        high = select_lanes(builder, value, list(range(half, 2 * half)))
        value = builder.fadd(low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


def _add_lanes(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, low: list[int], high: list[int]) -> ir.Value:
    """Lanes `low` of two registers next to each other, and lanes `high` of them."""
    masks = (ir.Constant(ir.VectorType(I32, len(lanes)), lanes) for lanes in (low, high))
    return builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks))


@instruction(f32x8, f32x8, f32x8)
def sum_halves(builder, a, b):
    """Sums of the halves of a, and of those of b: where `sum_lanes` begins."""
    return _add_lanes(builder, a, b, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])


@instruction(f32x8, f32x8, f32x8)
def sum_quarters(builder, ab, cd):
    """Out of `sum_halves` the sums of all lanes of a, b, c and d: lanes 0 to 3."""
    pairs = _add_lanes(builder, ab, cd, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])
    return _add_lanes(builder, pairs, pairs, [0, 4, 2, 6, 0, 4, 2, 6], [1, 5, 3, 7, 1, 5, 3, 7])


def _lane_store(lane: int) -> Any:
    @instruction(types.void, types.intp, f32x8)
    def store_lane(builder, address, value):
        one = builder.extract_element(value, ir.Constant(I32, lane))
        builder.store(one, builder.inttoptr(address, F32.as_pointer()))

    return store_lane


store_lane_0, store_lane_1, store_lane_2, store_lane_3 = (_lane_store(lane) for lane in range(4))
