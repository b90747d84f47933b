"""The instructions that a quantised matrix is multiplied with: integer products, four bits into eight, pairs of rows.

What differs between levels takes the level as an argument (`emit_...`), as in `simd.py`.
"""

from typing import Any

from llvmlite import ir
from numba.core import types

from fewfire.kernels.level import LEVEL
from fewfire.kernels.simd import (
    I8,
    I16,
    I32,
    constant,
    f32x8,
    i8x32,
    i16x16,
    i32x8,
    instruction,
    invoke,
    load,
    select_lanes,
    splat,
)


def _sum_neighbours(builder: ir.IRBuilder, products: ir.Value) -> ir.Value:
    """Sums of two neighbours: half as many lanes."""
    even, odd = (select_lanes(builder, products, list(range(k, products.type.count, 2))) for k in (0, 1))
    return builder.add(even, odd)


def _dot_plain(builder: ir.IRBuilder, acc: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    wide = ir.VectorType(I32, 32)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    return builder.add(acc, _sum_neighbours(builder, _sum_neighbours(builder, products)))


def _dot_neon(builder: ir.IRBuilder, acc: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    halves = []
    for half in (0, 1):
        lanes, bytes_ = range(4 * half, 4 * half + 4), range(16 * half, 16 * half + 16)
        part = select_lanes(builder, acc, list(lanes))
        ab = [select_lanes(builder, v, list(bytes_)) for v in (a, b)]
        halves.append(invoke(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", part.type, part, *ab))
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, 8), list(range(8))))


def _dot_vnni(builder: ir.IRBuilder, acc: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    # LLVM 22 has the bytes as <32 x i8>, older ones as <8 x i32>; it still reads the older form.
    words = [builder.bitcast(v, i32x8.llvm) for v in (unsigned, signed)]
    return invoke(builder, "llvm.x86.avx512.vpdpbusd.256", i32x8.llvm, acc, *words)


def _pairs_avx2(builder: ir.IRBuilder, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """Sums of two products as 16-bit lanes (saturating: the callers' ranges rule that out)."""
    return invoke(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), unsigned, signed)


def _widen_avx2(builder: ir.IRBuilder, pairs: ir.Value) -> ir.Value:
    return invoke(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, pairs, constant(I16, 16, 1))


def emit_dot_i16(builder: ir.IRBuilder, level: str, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    if level in ("vnni", "avx2"):  # LLVM makes vpdpwssd of the pair where there is VNNI
        return builder.add(acc, invoke(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, w, x))
    wide = ir.VectorType(I32, 16)
    products = builder.mul(builder.sext(w, wide), builder.sext(x, wide))
    return builder.add(acc, _sum_neighbours(builder, products))


@instruction(i32x8, i32x8, i16x16, i16x16)
def dot_i16(builder, acc, w, x):
    """acc[l] + w[2l] * x[2l] + w[2l + 1] * x[2l + 1]."""
    return emit_dot_i16(builder, LEVEL, acc, w, x)


@instruction(i32x8, i32x8, i32x8)
def sum_pairs(builder, low, high):
    """Sums of neighbouring lanes, of the first register and then of the second."""
    even, odd = (ir.Constant(ir.VectorType(I32, 8), list(range(k, 16, 2))) for k in (0, 1))
    return builder.add(builder.shuffle_vector(low, high, even), builder.shuffle_vector(low, high, odd))


def emit_dot_u4(builder: ir.IRBuilder, level: str, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    if level == "vnni":
        return _dot_vnni(builder, acc, w, x)
    if level == "avx2":
        pairs = builder.add(builder.bitcast(acc, ir.VectorType(I16, 16)), _pairs_avx2(builder, w, x))
        return builder.bitcast(pairs, i32x8.llvm)
    return (_dot_neon if level == "neon" else _dot_plain)(builder, acc, w, x)


@instruction(i32x8, i32x8, i8x32, i8x32)
def dot_u4(builder, acc, w, x):
    """acc[l] + sum of w[4l + k] * x[4l + k], k < 4; w from 0 to 15, x from -127 to 127.

    Up to eight times on an accumulator that starts at zero; then `settle` it.

    Between the calls the accumulator's contents are the level's own affair: avx2 keeps 16-bit sums of pairs
    (8 * 2 * 15 * 127 = 30480 fits), which saves one widening per call.
    """
    return emit_dot_u4(builder, LEVEL, acc, w, x)


def emit_settle(builder: ir.IRBuilder, level: str, acc: ir.Value) -> ir.Value:
    if level == "avx2":
        return _widen_avx2(builder, builder.bitcast(acc, ir.VectorType(I16, 16)))
    return acc


@instruction(i32x8, i32x8)
def settle(builder, acc):
    """The 32-bit lane sums of an accumulator of `dot_u4`."""
    return emit_settle(builder, LEVEL, acc)


def _lowest(bits: int) -> Any:
    @instruction(i8x32, i8x32)
    def lowest(builder, packed):
        return builder.and_(packed, constant(I8, 32, (1 << bits) - 1))

    return lowest


def _without_lowest(bits: int) -> Any:
    @instruction(i8x32, i8x32)
    def without_lowest(builder, packed):
        return builder.lshr(packed, constant(I8, 32, bits))

    return without_lowest


# The lowest four or two bits of each byte, and the others, as many places lower.
low_nibbles, high_nibbles = _lowest(4), _without_lowest(4)
low_pairs, without_low_pairs = _lowest(2), _without_lowest(2)


@instruction(f32x8, types.intp)
def load_low_nibbles_as_f32(builder, address):
    """The low halves of 8 bytes."""
    wide = builder.zext(load(builder, address, ir.VectorType(I8, 8)), i32x8.llvm)
    return builder.sitofp(builder.and_(wide, constant(I32, 8, 15)), f32x8.llvm)


@instruction(f32x8, types.intp)
def load_high_nibbles_as_f32(builder, address):
    """The high halves of 8 bytes."""
    wide = builder.zext(load(builder, address, ir.VectorType(I8, 8)), i32x8.llvm)
    return builder.sitofp(builder.lshr(wide, constant(I32, 8, 4)), f32x8.llvm)


# --- pairs of rows ----------------------------------------------------------------------------------------------------
# Two rows that are to be scaled and added are interleaved column by column, so that one multiplication of neighbours
# with the rows' pair of factors gives a sum per column. Interleaving goes by halves of 128 bits, as AVX2 does it.


def _halves(lanes: int, high: bool) -> ir.Constant:
    """The lanes of two vectors in turn: of the lower or the higher part of each half."""
    half, part = lanes // 2, lanes // 4
    first = [start + i + part * high for start in (0, half) for i in range(part)]
    mask = [lane for i in first for lane in (i, i + lanes)]
    return ir.Constant(ir.VectorType(I32, lanes), mask)


def _interleaver(vector: Any, lanes: int, high: bool) -> Any:
    @instruction(vector, vector, vector)
    def interleave(builder, a, b):
        return builder.shuffle_vector(a, b, _halves(lanes, high))

    return interleave


# Columns 0 to 7 and 16 to 23 of two rows of bytes; 8 to 15 and 24 to 31.
interleave_low_i8, interleave_high_i8 = _interleaver(i8x32, 32, False), _interleaver(i8x32, 32, True)
# Columns 0 to 3 and 8 to 11 of two rows of int16; 4 to 7 and 12 to 15.
interleave_low_i16, interleave_high_i16 = _interleaver(i16x16, 16, False), _interleaver(i16x16, 16, True)


def emit_add_pairs_u4(builder: ir.IRBuilder, level: str, acc: ir.Value, w: ir.Value, factors: ir.Value) -> ir.Value:
    if level in ("vnni", "avx2"):
        return builder.add(acc, _pairs_avx2(builder, w, factors))
    wide = ir.VectorType(I16, 32)
    products = builder.mul(builder.zext(w, wide), builder.sext(factors, wide))
    return builder.add(acc, _sum_neighbours(builder, products))


@instruction(i16x16, i16x16, i8x32, i8x32)
def add_pairs_u4(builder, acc, w, factors):
    """acc[l] + w[2l] * factors[2l] + w[2l + 1] * factors[2l + 1]; w from 0 to 15, factors from -127 to 127.

    Eight times do not overflow: 8 * 2 * 15 * 127 = 30480.
    """
    return emit_add_pairs_u4(builder, LEVEL, acc, w, factors)


@instruction(i16x16)
def zeros_i16(builder):
    """All lanes zero."""
    return constant(I16, 16, 0)


@instruction(i8x32, types.intp)
def splat_i8_pair_at(builder, address):
    """Four bytes in memory, which are a pair twice, over and over."""
    return builder.bitcast(splat(builder, load(builder, address, I32), 8), i8x32.llvm)


@instruction(i16x16, types.intp)
def splat_i16_pair_at(builder, address):
    """Two int16 in memory, over and over."""
    return builder.bitcast(splat(builder, load(builder, address, I32), 8), i16x16.llvm)


def _pair_store(bits: int) -> Any:
    """Pairs of 8 bits are stored twice each: repeating 32 bits takes one instruction less than repeating 16."""

    @instruction(types.void, types.intp, f32x8, f32x8)
    def store_pairs(builder, address, a, b):
        """a[0], b[0], a[1], b[1] and so on as integers, rounded to nearest even; they must fit."""
        low, high = (builder.fptosi(invoke(builder, "llvm.rint.v8f32", f32x8.llvm, v), i32x8.llvm) for v in (a, b))
        low = builder.and_(low, constant(I32, 8, (1 << bits) - 1))
        pairs = builder.or_(low, builder.shl(high, constant(I32, 8, bits)))
        if bits == 8:
            pairs = builder.and_(pairs, constant(I32, 8, 0xFFFF))
            pairs = builder.or_(pairs, builder.shl(pairs, constant(I32, 8, 16)))
        builder.store(pairs, builder.inttoptr(address, pairs.type.as_pointer()), align=1)

    return store_pairs


store_i8_pairs, store_i16_pairs = _pair_store(8), _pair_store(16)


@instruction(f32x8, i16x16)
def low_i16_as_f32(builder, value):
    """The lower eight."""
    return builder.sitofp(select_lanes(builder, value, list(range(8))), f32x8.llvm)


@instruction(f32x8, i16x16)
def high_i16_as_f32(builder, value):
    """The higher eight."""
    return builder.sitofp(select_lanes(builder, value, list(range(8, 16))), f32x8.llvm)


@instruction(f32x8, i32x8, i32x8)
def low_halves_as_f32(builder, a, b):
    """The lower half of each."""
    return builder.sitofp(builder.shuffle_vector(a, b, ir.Constant(i32x8.llvm, [0, 1, 2, 3, 8, 9, 10, 11])), f32x8.llvm)


@instruction(f32x8, i32x8, i32x8)
def high_halves_as_f32(builder, a, b):
    """The higher half of each."""
    mask = ir.Constant(i32x8.llvm, [4, 5, 6, 7, 12, 13, 14, 15])
    return builder.sitofp(builder.shuffle_vector(a, b, mask), f32x8.llvm)
