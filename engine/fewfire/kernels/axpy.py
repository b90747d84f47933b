"""Scatter: scaled sums of listed rows into y. The list and the matrix are as for `gather.py`.

Rows keep their columns in order. Quantised rows go eight at a time through integers: a row's factor times the scale of
a group is its coefficient for the group's columns, and the eight coefficients of a group are rounded to 8 bits (for q4)
or 16 bits (for q8) of their largest. Two rows are interleaved, so that one instruction multiplies a column of both with
their two coefficients and adds. Sixteen bits lose nothing beside 8-bit weights, and eight lose what rounding the
activations to 8 bits would. In float32 the same sums take twice as many instructions (perf/LOG.md, "down rows in
integers").
"""

import numpy as np
from numba import types

from fewfire.kernels.compile import ZERO, inline, primitive
from fewfire.kernels.products import (
    add_pairs_u4,
    dot_i16,
    high_halves_as_f32,
    high_i16_as_f32,
    high_nibbles,
    interleave_high_i8,
    interleave_high_i16,
    interleave_low_i8,
    interleave_low_i16,
    low_halves_as_f32,
    low_i16_as_f32,
    low_nibbles,
    splat_i8_pair_at,
    splat_i16_pair_at,
    store_i8_pairs,
    store_i16_pairs,
    zeros_i16,
)
from fewfire.kernels.simd import (
    absolute,
    add,
    divide,
    fma,
    load_bf16x8,
    load_f16x8,
    load_f32,
    load_f32x8,
    load_i8x16_as_i16,
    load_i8x32,
    load_i32,
    load_i64,
    maximum,
    mul,
    prefetch,
    rint,
    splat_f32,
    splat_f32_at,
    store_f32,
    store_f32x8,
    store_i64,
    subtract,
    zeros_i32,
)

_I = types.int64

BLOCK = 8  # rows that are added at a time; even, and no more than `add_pairs_u4` allows
_LEAST = 1e-30  # instead of a largest coefficient of zero

# Scratch begins with a block's arrays: the addresses of its rows and of those that come next, and its factors.
_ROWS, _SOON, _FACTORS, _REST = 0, 8 * BLOCK, 16 * BLOCK, 20 * BLOCK


@inline
def _plan(size, count, blocks):
    """How to ask for `count` rows of so many bytes in the course of so many blocks of columns.

    How many pieces of a row there are in a block, and the bytes of a piece: whole rows, or a part of one.
    """
    pieces, parts = (count + blocks - 1) // blocks, max(1, blocks // count)
    return pieces, (size // parts + 63) // 64 * 64


@inline
def _ask_for(scratch, count, size, pieces, piece, k, at):
    """Prefetches the next pieces, the first at byte `at` of the k-th of the rows that come next; where it stopped.

    A row's lines are asked for in order, so that the hardware sees a stream where rows are neighbours.
    """
    for _ in range(pieces):
        if k < count:
            row, end = load_i64(scratch + _SOON + 8 * k), min(at + piece, size)
            for line in range(at, end, 64):
                prefetch(row + line)
            at = end
            if at >= size:
                k, at = k + 1, 0
    return k, at


@inline
def _row(scratch, k):
    return load_i64(scratch + _ROWS + 8 * k)


@inline
def _factor(scratch, k):
    return splat_f32_at(scratch + _FACTORS + 4 * k)


# --- float rows -------------------------------------------------------------------------------------------------------


@inline
def _add_float(load, size, count, y, columns, scratch):
    """Two and two, so that y is read and written once for two rows."""
    for k in range(0, count, 2):
        p, q, f, g = _row(scratch, k), _row(scratch, k + 1), _factor(scratch, k), _factor(scratch, k + 1)
        later = load_i64(scratch + _SOON + 8 * k), load_i64(scratch + _SOON + 8 * k + 8)
        for line in range(0, size * columns + 63, 64):
            prefetch(later[0] + line)
            prefetch(later[1] + line)
        for i in range(0, columns, 8):
            v = fma(f, load(p + size * i), load_f32x8(y + 4 * i))
            store_f32x8(y + 4 * i, fma(g, load(q + size * i), v))


@inline
def _add_f32(count, y, columns, scratch):
    _add_float(load_f32x8, 4, count, y, columns, scratch)


@inline
def _add_bf16(count, y, columns, scratch):
    _add_float(load_bf16x8, 2, count, y, columns, scratch)


# --- quantised rows ---------------------------------------------------------------------------------------------------
# After the block's arrays in the scratch, for g = the number of groups rounded up to eight: g scales of the
# coefficients, g offsets of q4 columns, and of each pair of rows g pairs of coefficients, 32 bits each.


@inline
def _whole(groups):
    return (groups + 7) // 8 * 8


@inline
def _offset(scratch, k, at, minimum, coefficient, inverse, scale, middle, total):
    """Adds what row k adds to each column: factor times minimum, and what rounding took from the middle integer.

    So an error of a coefficient counts only for how far the integers are from the middle of their range.
    """
    rounded = mul(rint(mul(coefficient, inverse)), scale)
    total = fma(_factor(scratch, k), load_f16x8(_row(scratch, k) + at + minimum), total)
    return fma(splat_f32(middle), subtract(coefficient, rounded), total)


@inline
def _coefficients(largest_integer, middle, store, count, at, groups, scratch):
    """Integers and scales of all coefficients, and for rows with minima (`middle` is not 0) each group's offset.

    `at`: where the groups' scales are in a row. Reads and writes up to 7 groups past the end. Where a factor is not
    finite, neither are the scales.
    """
    top, step, minimum = splat_f32(largest_integer), 4 * _whole(groups), 2 * groups
    for g in range(0, groups, 8):
        largest, finite, out = splat_f32(_LEAST), splat_f32(0.0), scratch + _REST + 4 * g
        for k in range(count):
            coefficient = mul(_factor(scratch, k), load_f16x8(_row(scratch, k) + at + 2 * g))
            largest = maximum(largest, absolute(coefficient))
            finite = fma(coefficient, splat_f32(0.0), finite)
        scale, inverse, total = add(divide(largest, top), finite), divide(top, largest), splat_f32(0.0)
        for k in range(0, count, 2):
            a = mul(_factor(scratch, k), load_f16x8(_row(scratch, k) + at + 2 * g))
            b = mul(_factor(scratch, k + 1), load_f16x8(_row(scratch, k + 1) + at + 2 * g))
            store(out + 2 * step + step * (k // 2), mul(a, inverse), mul(b, inverse))
            if middle > 0.0:
                total = _offset(scratch, k, at + 2 * g, minimum, a, inverse, scale, middle, total)
                total = _offset(scratch, k + 1, at + 2 * g, minimum, b, inverse, scale, middle, total)
        store_f32x8(out, scale)
        store_f32x8(out + step, total)


@inline
def _pair_q8(p, q, pair, sums):
    """Adds 32 columns of two rows."""
    a, b, c, d = sums
    factors = splat_i16_pair_at(pair)
    v, w = load_i8x16_as_i16(p), load_i8x16_as_i16(q)
    a, b = dot_i16(a, interleave_low_i16(v, w), factors), dot_i16(b, interleave_high_i16(v, w), factors)
    v, w = load_i8x16_as_i16(p + 16), load_i8x16_as_i16(q + 16)
    c, d = dot_i16(c, interleave_low_i16(v, w), factors), dot_i16(d, interleave_high_i16(v, w), factors)
    return a, b, c, d


@inline
def _add_to(y, scale, offset, values):
    """y += scale * values + offset, 32 columns."""
    a, b, c, d = values
    store_f32x8(y, fma(scale, a, add(load_f32x8(y), offset)))
    store_f32x8(y + 32, fma(scale, b, add(load_f32x8(y + 32), offset)))
    store_f32x8(y + 64, fma(scale, c, add(load_f32x8(y + 64), offset)))
    store_f32x8(y + 96, fma(scale, d, add(load_f32x8(y + 96), offset)))


@inline
def _add_q8(count, y, columns, scratch):
    groups = columns // 32
    step = 4 * _whole(groups)
    scale, pairs = scratch + _REST, scratch + _REST + 2 * step
    _coefficients(32767.0, 0.0, store_i16_pairs, count, columns, groups, scratch)
    size, row, byte = columns + 2 * groups + 63, ZERO, ZERO
    pieces, piece = _plan(size, count, groups)
    for at in range(0, columns, 32):
        row, byte = _ask_for(scratch, count, size, pieces, piece, row, byte)
        sums = zeros_i32(), zeros_i32(), zeros_i32(), zeros_i32()
        for k in range(0, count, 2):
            sums = _pair_q8(_row(scratch, k) + at, _row(scratch, k + 1) + at, pairs + step * (k // 2), sums)
        a, b, c, d = sums
        values = low_halves_as_f32(a, b), high_halves_as_f32(a, b), low_halves_as_f32(c, d), high_halves_as_f32(c, d)
        _add_to(y + 4 * at, splat_f32_at(scale), splat_f32(0.0), values)
        scale, pairs = scale + 4, pairs + 4


@inline
def _pair_q4(p, q, pair, sums):
    """Adds 64 columns of two rows, which are two groups."""
    a, b, c, d = sums
    v, w = load_i8x32(p), load_i8x32(q)
    low, high = interleave_low_i8(v, w), interleave_high_i8(v, w)
    factors = splat_i8_pair_at(pair)
    a, b = add_pairs_u4(a, low_nibbles(low), factors), add_pairs_u4(b, low_nibbles(high), factors)
    factors = splat_i8_pair_at(pair + 4)
    c, d = add_pairs_u4(c, high_nibbles(low), factors), add_pairs_u4(d, high_nibbles(high), factors)
    return a, b, c, d


@inline
def _four_parts(low, high):
    """32 columns in order."""
    return low_i16_as_f32(low), low_i16_as_f32(high), high_i16_as_f32(low), high_i16_as_f32(high)


@inline
def _add_q4(count, y, columns, scratch):
    groups, parameters = columns // 32, columns // 2
    whole = _whole(groups)
    scale, offset, pairs = scratch + _REST, scratch + _REST + 4 * whole, scratch + _REST + 8 * whole
    _coefficients(127.0, 7.5, store_i8_pairs, count, parameters, groups, scratch)
    size, row, byte = parameters + 4 * groups + 63, ZERO, ZERO
    pieces, piece = _plan(size, count, groups // 2)
    for at in range(0, parameters, 32):
        row, byte = _ask_for(scratch, count, size, pieces, piece, row, byte)
        sums = zeros_i16(), zeros_i16(), zeros_i16(), zeros_i16()
        for k in range(0, count, 2):
            sums = _pair_q4(_row(scratch, k) + at, _row(scratch, k + 1) + at, pairs + 2 * whole * k, sums)
        a, b, c, d = sums
        _add_to(y + 8 * at, splat_f32_at(scale), splat_f32_at(offset), _four_parts(a, b))
        _add_to(y + 8 * at + 128, splat_f32_at(scale + 4), splat_f32_at(offset + 4), _four_parts(c, d))
        scale, offset, pairs = scale + 8, offset + 8, pairs + 8


# --- lists ------------------------------------------------------------------------------------------------------------


@inline
def _fill_block(matrix, stride, rows, soon, factors, count, scratch):
    """The arrays of a block of at most `BLOCK` entries of a list, with one of factor 0 if their number is odd."""
    count = min(count, BLOCK)
    even = count + count % 2
    for k in range(even):
        entry = 4 * min(k, count - 1)
        store_i64(scratch + _ROWS + 8 * k, matrix + stride * load_i32(rows + entry))
        store_i64(scratch + _SOON + 8 * k, (matrix + stride * load_i32(soon + entry)) & -64)
        store_f32(scratch + _FACTORS + 4 * k, load_f32(factors + entry) if k < count else np.float32(0.0))
    return even


@inline
def _gather_axpy(add_rows, matrix, stride, rows, soon, count, factors, y, columns, scratch):
    """y += the sum of factors[j] * row rows[j] for j < count; rows that `soon` lists are asked for."""
    for j in range(0, 4 * count, 4 * BLOCK):
        size = _fill_block(matrix, stride, rows + j, soon + j, factors + j, count - j // 4, scratch)
        add_rows(size, y, columns, scratch)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_axpy_f32(matrix, stride, rows, soon, count, factors, y, columns, scratch):
    _gather_axpy(_add_f32, matrix, stride, rows, soon, count, factors, y, columns, scratch)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_axpy_bf16(matrix, stride, rows, soon, count, factors, y, columns, scratch):
    _gather_axpy(_add_bf16, matrix, stride, rows, soon, count, factors, y, columns, scratch)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_axpy_q8(matrix, stride, rows, soon, count, factors, y, columns, scratch):
    _gather_axpy(_add_q8, matrix, stride, rows, soon, count, factors, y, columns, scratch)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_axpy_q4(matrix, stride, rows, soon, count, factors, y, columns, scratch):
    _gather_axpy(_add_q4, matrix, stride, rows, soon, count, factors, y, columns, scratch)
