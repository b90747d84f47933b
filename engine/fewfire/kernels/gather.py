"""The two kernels of the engine: dot products of listed rows with x, and scaled sums of listed rows into y.

A matrix is the address of its first row and the bytes from row to row; a list of rows is an address of int32. How a row
is encoded is the format in a kernel's name (see `quantize.py`, which is these kernels' twin): f32 and bf16 hold one
element per column, q8 and q4 integers, then a float16 scale per group of 32 columns, q4 then a float16
minimum per group. A row's columns are
padded to a multiple of 64. For dot products the integers of up to
eight groups are interleaved four by four, so that each 32-bit lane of a register sums one group, and scales are applied
once per block of groups instead of once per group. Rows for `axpy` keep their columns in order.
"""

import numpy as np
from numba import types

from fewfire.kernels import simd
from fewfire.kernels.compile import inline, primitive
from fewfire.kernels.simd import (
    add,
    dot_i16,
    dot_u4,
    first_lane,
    fma,
    high_nibbles,
    load_bf16x8,
    load_f16x2,
    load_f16x4,
    load_f16x8,
    load_f32,
    load_f32x8,
    load_i8,
    load_i8x8_as_f32,
    load_i8x16_as_i16,
    load_i8x32,
    load_i16x16,
    load_i32,
    load_i32x8,
    load_i64,
    low_nibbles,
    mul,
    prefetch,
    settle,
    splat_f32,
    splat_f32_at,
    store_f32,
    store_f32x8,
    sum_lanes,
    sum_pairs,
    to_f32,
    zeros_i32,
)

_I = types.int64

# An activation vector (or a batch of them) is known by the address of its descriptor, int64 words at these bytes: the
# addresses of its float32 values, of its quants in the rows' interleaved order, of its float32 scales and sums, both
# one per 32-bit lane of each block of groups (the group's scale; that times the sum of the lane's quants); the padded
# number of columns; the lanes of one vector; the address of 512 bytes of scratch for each vector. Quants are int8 for
# q4 rows, and int16 for q8 rows: it costs nothing there, and the format that is chosen to be exact should be.
VALUES, QUANTS, SCALES, SUMS, COLUMNS, LANES, SCRATCH = range(0, 56, 8)

# A row is asked for while the one so many entries before it in the list is worked on. Each pass over a block of neurons
# asks for its own rows of the next block, so that memory is as busy in one pass as in the others (perf/LOG.md,
# "prefetching neurons").
AHEAD = 16


# --- one row . x ------------------------------------------------------------------------------------------------------


@inline
def _dot_f32(row, x):
    a, b, c, d = splat_f32(0.0), splat_f32(0.0), splat_f32(0.0), splat_f32(0.0)
    values = load_i64(x + VALUES)
    for i in range(0, 4 * load_i64(x + COLUMNS), 128):
        a = fma(load_f32x8(row + i), load_f32x8(values + i), a)
        b = fma(load_f32x8(row + i + 32), load_f32x8(values + i + 32), b)
        c = fma(load_f32x8(row + i + 64), load_f32x8(values + i + 64), c)
        d = fma(load_f32x8(row + i + 96), load_f32x8(values + i + 96), d)
    return sum_lanes(add(add(a, b), add(c, d)))


@inline
def _dot_bf16(row, x):
    a, b = splat_f32(0.0), splat_f32(0.0)
    values = load_i64(x + VALUES)
    for i in range(0, 4 * load_i64(x + COLUMNS), 64):
        a = fma(load_bf16x8(row + i // 2), load_f32x8(values + i), a)
        b = fma(load_bf16x8(row + i // 2 + 16), load_f32x8(values + i + 32), b)
    return sum_lanes(add(a, b))


@inline
def _block_q8(row, quants, groups):
    low, high = zeros_i32(), zeros_i32()
    for i in range(0, 32 * groups, 32):
        low = dot_i16(low, load_i8x16_as_i16(row + i), load_i16x16(quants + 2 * i))
        high = dot_i16(high, load_i8x16_as_i16(row + i + 16), load_i16x16(quants + 2 * i + 32))
    return sum_pairs(low, high)


@inline
def _block_q4(row, quants, groups):
    acc = zeros_i32()
    for i in range(0, 16 * groups, 32):
        packed = load_i8x32(row + i)
        acc = dot_u4(acc, low_nibbles(packed), load_i8x32(quants + 2 * i))
        acc = dot_u4(acc, high_nibbles(packed), load_i8x32(quants + 2 * i + 32))
    return settle(acc)


@inline
def _dot_q8(row, x):
    columns = load_i64(x + COLUMNS)
    groups, quants, x_scale = columns // 32, load_i64(x + QUANTS), load_i64(x + SCALES)
    scale = row + columns
    acc = splat_f32(0.0)
    for _ in range(groups // 8):
        acc = fma(to_f32(_block_q8(row, quants, 8)), mul(load_f16x8(scale), load_f32x8(x_scale)), acc)
        row, quants, scale, x_scale = row + 256, quants + 512, scale + 16, x_scale + 32
    if groups & 4:
        acc = fma(to_f32(_block_q8(row, quants, 4)), mul(load_f16x4(scale), load_f32x8(x_scale)), acc)
        row, quants, scale, x_scale = row + 128, quants + 256, scale + 8, x_scale + 32
    if groups & 2:
        acc = fma(to_f32(_block_q8(row, quants, 2)), mul(load_f16x2(scale), load_f32x8(x_scale)), acc)
    return sum_lanes(acc)


@inline
def _dot_q4(row, x):
    columns = load_i64(x + COLUMNS)
    groups, quants, x_scale = columns // 32, load_i64(x + QUANTS), load_i64(x + SCALES)
    scale, sums = row + columns // 2, load_i64(x + SUMS)
    minimum = scale + 2 * groups
    acc = splat_f32(0.0)
    for _ in range(groups // 8):
        acc = fma(to_f32(_block_q4(row, quants, 8)), mul(load_f16x8(scale), load_f32x8(x_scale)), acc)
        acc = fma(load_f16x8(minimum), load_f32x8(sums), acc)
        row, quants, scale, x_scale = row + 128, quants + 256, scale + 16, x_scale + 32
        minimum, sums = minimum + 16, sums + 32
    if groups & 4:
        acc = fma(to_f32(_block_q4(row, quants, 4)), mul(load_f16x4(scale), load_f32x8(x_scale)), acc)
        acc = fma(load_f16x4(minimum), load_f32x8(sums), acc)
        row, quants, scale, x_scale = row + 64, quants + 128, scale + 8, x_scale + 32
        minimum, sums = minimum + 8, sums + 32
    if groups & 2:
        acc = fma(to_f32(_block_q4(row, quants, 2)), mul(load_f16x2(scale), load_f32x8(x_scale)), acc)
        acc = fma(load_f16x2(minimum), load_f32x8(sums), acc)
    return sum_lanes(acc)


@inline
def _prefetch_row(matrix, stride, rows, j, known, size):
    if j < known:
        row = matrix + stride * load_i32(rows + 4 * j)
        for line in range(0, size, 64):
            prefetch(row + line)


@inline
def _gather_dot(dot, matrix, stride, rows, count, known, size, x, out):
    """out[j] = row rows[j] . x for j < count.

    The list has `known` entries in all, and those after the first `count` are wanted soon; `size`: bytes of a row.
    """
    for j in range(count):
        _prefetch_row(matrix, stride, rows, j + AHEAD, known, size)
        store_f32(out + 4 * j, dot(matrix + stride * load_i32(rows + 4 * j), x))


@primitive(_I, _I, _I, _I, _I, _I, _I, _I)
def gather_dot_f32(matrix, stride, rows, count, known, size, x, out):
    _gather_dot(_dot_f32, matrix, stride, rows, count, known, size, x, out)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I)
def gather_dot_bf16(matrix, stride, rows, count, known, size, x, out):
    _gather_dot(_dot_bf16, matrix, stride, rows, count, known, size, x, out)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I)
def gather_dot_q8(matrix, stride, rows, count, known, size, x, out):
    _gather_dot(_dot_q8, matrix, stride, rows, count, known, size, x, out)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I)
def gather_dot_q4(matrix, stride, rows, count, known, size, x, out):
    _gather_dot(_dot_q4, matrix, stride, rows, count, known, size, x, out)


# --- y += four scaled rows --------------------------------------------------------------------------------------------
# Four at a time, so that y is read and written once for four rows.


@inline
def _axpy_f32(rows, factors, y, columns, scratch):
    r0, r1, r2, r3 = rows
    f0, f1, f2, f3 = (
        splat_f32(factors[0]),
        splat_f32(factors[1]),
        splat_f32(factors[2]),
        splat_f32(factors[3]),
    )
    for i in range(0, 4 * columns, 32):
        s = fma(f0, load_f32x8(r0 + i), load_f32x8(y + i))
        s = fma(f1, load_f32x8(r1 + i), s)
        s = fma(f2, load_f32x8(r2 + i), s)
        store_f32x8(y + i, fma(f3, load_f32x8(r3 + i), s))


@inline
def _axpy_bf16(rows, factors, y, columns, scratch):
    r0, r1, r2, r3 = rows
    f0, f1, f2, f3 = (
        splat_f32(factors[0]),
        splat_f32(factors[1]),
        splat_f32(factors[2]),
        splat_f32(factors[3]),
    )
    for i in range(0, 2 * columns, 16):
        s = fma(f0, load_bf16x8(r0 + i), load_f32x8(y + 2 * i))
        s = fma(f1, load_bf16x8(r1 + i), s)
        s = fma(f2, load_bf16x8(r2 + i), s)
        store_f32x8(y + 2 * i, fma(f3, load_bf16x8(r3 + i), s))


@inline
def _group_factors(parameters, factor, groups, out):
    """Factor times each group's scale or minimum, for one row. Reads and writes up to 7 groups past the end."""
    f = splat_f32(factor)
    for i in range(0, groups, 8):
        store_f32x8(out + 4 * i, mul(f, load_f16x8(parameters + 2 * i)))


@inline
def _scaled_factors(rows, factors, quant_bytes, groups, scratch):
    stride = 4 * ((groups + 7) // 8 * 8)
    for j in range(4):
        _group_factors(rows[j] + quant_bytes, factors[j], groups, scratch + j * stride)
    return stride


@inline
def _axpy_q8(rows, factors, y, columns, scratch):
    stride = _scaled_factors(rows, factors, columns, columns // 32, scratch)
    r0, r1, r2, r3 = rows
    for _ in range(columns // 32):
        f0, f1 = splat_f32_at(scratch), splat_f32_at(scratch + stride)
        f2, f3 = splat_f32_at(scratch + 2 * stride), splat_f32_at(scratch + 3 * stride)
        for i in range(0, 32, 8):
            s = fma(f0, load_i8x8_as_f32(r0 + i), load_f32x8(y + 4 * i))
            s = fma(f1, load_i8x8_as_f32(r1 + i), s)
            s = fma(f2, load_i8x8_as_f32(r2 + i), s)
            store_f32x8(y + 4 * i, fma(f3, load_i8x8_as_f32(r3 + i), s))
        r0, r1, r2, r3, y, scratch = r0 + 32, r1 + 32, r2 + 32, r3 + 32, y + 128, scratch + 4


@inline
def _sum_minima(rows, factors, offset, groups, out):
    """What the four rows' minima add to each column of a group: the sum of factor times minimum."""
    r0, r1, r2, r3 = rows[0] + offset, rows[1] + offset, rows[2] + offset, rows[3] + offset
    f0, f1, f2, f3 = splat_f32(factors[0]), splat_f32(factors[1]), splat_f32(factors[2]), splat_f32(factors[3])
    for i in range(0, 2 * groups, 16):
        s = add(mul(f0, load_f16x8(r0 + i)), mul(f1, load_f16x8(r1 + i)))
        s = fma(f3, load_f16x8(r3 + i), fma(f2, load_f16x8(r2 + i), s))
        store_f32x8(out + 2 * i, s)


@inline
def _group_q4(row, factor, half, s0, s1, s2, s3):
    packed = load_i32x8(row)
    if half == 0:
        s0 = fma(factor, simd.nibble_0(packed), s0)
        s1 = fma(factor, simd.nibble_1(packed), s1)
        s2 = fma(factor, simd.nibble_2(packed), s2)
        s3 = fma(factor, simd.nibble_3(packed), s3)
    else:
        s0 = fma(factor, simd.nibble_4(packed), s0)
        s1 = fma(factor, simd.nibble_5(packed), s1)
        s2 = fma(factor, simd.nibble_6(packed), s2)
        s3 = fma(factor, simd.nibble_7(packed), s3)
    return s0, s1, s2, s3


@inline
def _axpy_q4(rows, factors, y, columns, scratch):
    groups = columns // 32
    stride = _scaled_factors(rows, factors, columns // 2, groups, scratch)
    _sum_minima(rows, factors, columns // 2 + 2 * groups, groups, scratch + 4 * stride)
    r0, r1, r2, r3 = rows
    for _ in range(columns // 64):
        for half in range(2):
            m = splat_f32_at(scratch + 4 * stride)
            s0, s1 = add(m, load_f32x8(y)), add(m, load_f32x8(y + 32))
            s2, s3 = add(m, load_f32x8(y + 64)), add(m, load_f32x8(y + 96))
            s0, s1, s2, s3 = _group_q4(r0, splat_f32_at(scratch), half, s0, s1, s2, s3)
            s0, s1, s2, s3 = _group_q4(r1, splat_f32_at(scratch + stride), half, s0, s1, s2, s3)
            s0, s1, s2, s3 = _group_q4(r2, splat_f32_at(scratch + 2 * stride), half, s0, s1, s2, s3)
            s0, s1, s2, s3 = _group_q4(r3, splat_f32_at(scratch + 3 * stride), half, s0, s1, s2, s3)
            store_f32x8(y, s0)
            store_f32x8(y + 32, s1)
            store_f32x8(y + 64, s2)
            store_f32x8(y + 96, s3)
            y, scratch = y + 128, scratch + 4
        r0, r1, r2, r3 = r0 + 32, r1 + 32, r2 + 32, r3 + 32


@inline
def _gather_axpy(axpy, matrix, stride, rows, count, known, size, factors, y, columns, scratch):
    """y += the sum of factors[j] * row rows[j] for j < count; `known` and `size` as for `gather_dot`."""
    for j in range(0, count - 3, 4):
        for k in range(4):
            _prefetch_row(matrix, stride, rows, j + k + AHEAD, known, size)
        at = (
            matrix + stride * load_i32(rows + 4 * j),
            matrix + stride * load_i32(rows + 4 * j + 4),
            matrix + stride * load_i32(rows + 4 * j + 8),
            matrix + stride * load_i32(rows + 4 * j + 12),
        )
        f = factors + 4 * j
        axpy(at, (load_f32(f), load_f32(f + 4), load_f32(f + 8), load_f32(f + 12)), y, columns, scratch)
    rest = count % 4
    if rest > 0:  # rows that are missing to four are the last one with factor 0
        j, zero = count - rest, np.float32(0.0)
        first, f = matrix + stride * load_i32(rows + 4 * j), factors + 4 * j
        second = matrix + stride * load_i32(rows + 4 * (j + (rest > 1)))
        third = matrix + stride * load_i32(rows + 4 * (count - 1))
        by = (load_f32(f), load_f32(f + 4) if rest > 1 else zero, load_f32(f + 8) if rest > 2 else zero, zero)
        axpy((first, second, third, first), by, y, columns, scratch)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_axpy_f32(matrix, stride, rows, count, known, size, factors, y, columns, scratch):
    _gather_axpy(_axpy_f32, matrix, stride, rows, count, known, size, factors, y, columns, scratch)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_axpy_bf16(matrix, stride, rows, count, known, size, factors, y, columns, scratch):
    _gather_axpy(_axpy_bf16, matrix, stride, rows, count, known, size, factors, y, columns, scratch)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_axpy_q8(matrix, stride, rows, count, known, size, factors, y, columns, scratch):
    _gather_axpy(_axpy_q8, matrix, stride, rows, count, known, size, factors, y, columns, scratch)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_axpy_q4(matrix, stride, rows, count, known, size, factors, y, columns, scratch):
    _gather_axpy(_axpy_q4, matrix, stride, rows, count, known, size, factors, y, columns, scratch)


# --- one row as float32 -----------------------------------------------------------------------------------------------


@inline
def _column(stored, groups):
    """The column and group of a stored integer of a dot row (see `quantize.dot_order`)."""
    block, start = 8, 0
    while stored - 32 * start >= 32 * block or groups - start < block:
        if groups - start >= block:
            start += block
        else:
            block //= 2
    inside = stored - 32 * start
    register, lane, byte = inside // 32, inside % 32 // 4, inside % 4
    return 32 * start + 4 * (lane * block + register) + byte


@inline
def _read_float(load, row, step, columns, out):
    for i in range(0, columns, 8):
        store_f32x8(out + 4 * i, load(row + step * i))


@primitive(_I, _I, _I)
def read_row_f32(row, columns, out):
    _read_float(load_f32x8, row, 4, columns, out)


@primitive(_I, _I, _I)
def read_row_bf16(row, columns, out):
    _read_float(load_bf16x8, row, 2, columns, out)


@primitive(_I, _I, _I)
def read_row_q8(row, columns, out):
    for i in range(columns):
        column = _column(i, columns // 32)
        scale = first_lane(load_f16x2(row + columns + column // 32 * 2))
        store_f32(out + 4 * column, np.float32(load_i8(row + i)) * scale)


@primitive(_I, _I, _I)
def read_row_q4(row, columns, out):
    groups, scales = columns // 32, row + columns // 2
    for i in range(columns):
        column = _column(i, groups)
        scale = first_lane(load_f16x2(scales + column // 32 * 2))
        minimum = first_lane(load_f16x2(scales + 2 * groups + column // 32 * 2))
        nibble = load_i8(row + i // 64 * 32 + i % 32) >> (i % 64 // 32 * 4) & 15
        store_f32(out + 4 * column, np.float32(nibble) * scale + minimum)
