"""Gather: dot products of listed rows with x.

A matrix is the address of its first row and the bytes from row to row; a list of rows is an address of int32. How a row
is encoded is the format in a kernel's name (see `quantize.py`, which is these kernels' twin): f32 and bf16 hold one
element per column, q8 and q4 integers, then a float16 scale per group of 32 columns, q4 then a float16 minimum per
group. A row's columns are padded to a multiple of 64. The integers of up to eight groups are interleaved four by four,
so that each 32-bit lane of a register sums one group, and scales are applied once per block of groups.

Four rows are worked on at once, from four places of the list, column block by column block, while the same blocks of
four later rows are asked for: a core reads four streams faster than one, and rows from anywhere only as
fast as it keeps requests under way (perf/LOG.md, "four rows at a time").
"""

from numba import types

from fewfire.kernels.compile import ZERO, inline, primitive
from fewfire.kernels.products import dot_i16, dot_u4, high_nibbles, low_nibbles, settle, sum_pairs
from fewfire.kernels.simd import (
    fma,
    load_bf16x8,
    load_f16x2,
    load_f16x4,
    load_f16x8,
    load_f32x8,
    load_i8x16_as_i16,
    load_i8x32,
    load_i16x16,
    load_i32,
    load_i64,
    mul,
    prefetch,
    splat_f32,
    store_lane_0,
    store_lane_1,
    store_lane_2,
    store_lane_3,
    sum_halves,
    sum_quarters,
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

SOON = 2  # where a list is worked through in order, its rows are asked for so many entries ahead
FLOATS, INTEGERS = 32, 256  # columns that are worked on between two questions for later rows
_BEGINNING = 1024  # bytes of a row, after which the hardware has found the stream


@inline
def ask_for_row(row, wanted):
    """Prefetches so many bytes of a row, or the beginning of them."""
    for line in range(row & -64, row + min(wanted, _BEGINNING), 64):
        prefetch(line)


@inline
def begin_streams(matrix, stride, wanted, rows, count):
    """Asks at once for the first rows of a list's quarters, up to those that are asked for while these are worked on.

    Otherwise they would arrive line after line (perf/LOG.md, "where a stream begins").
    """
    quarter = (count + 3) // 4
    for part in range(0, 4 * quarter, max(quarter, 1)):
        for i in range(part, min(part + SOON, count)):
            ask_for_row(matrix + stride * load_i32(rows + 4 * i), wanted)


@inline
def _ask_for(soon, start, stop):
    """Prefetches bytes start to stop of four rows."""
    a, b, c, d = soon
    for line in range(start, stop, 64):
        prefetch(a + line)
        prefetch(b + line)
        prefetch(c + line)
        prefetch(d + line)


@inline
def asking(block, columns, wanted):
    """How many bytes of a row are wanted soon, and the share of them that is asked for with each block of columns."""
    return wanted, max(64, (block * wanted // columns + 63) // 64 * 64)


@inline
def _four_float(load, size, rows, soon, ask, columns, x):
    (p, q, r, s), (wanted, share), values = rows, ask, load_i64(x + VALUES)
    a, b, c, d = splat_f32(0.0), splat_f32(0.0), splat_f32(0.0), splat_f32(0.0)
    for start in range(0, columns, FLOATS):
        asked = share * (start // FLOATS)
        _ask_for(soon, asked, min(wanted, asked + share))
        for i in range(start, start + FLOATS, 8):
            v, at = load_f32x8(values + 4 * i), size * i
            a, b = fma(load(p + at), v, a), fma(load(q + at), v, b)
            c, d = fma(load(r + at), v, c), fma(load(s + at), v, d)
    return a, b, c, d


@inline
def _four_f32(rows, soon, ask, columns, x):
    return _four_float(load_f32x8, 4, rows, soon, ask, columns, x)


@inline
def _four_bf16(rows, soon, ask, columns, x):
    return _four_float(load_bf16x8, 2, rows, soon, ask, columns, x)


@inline
def _scaled(products, load_scale, rows, scale, x_scale, totals):
    """totals + products * scales, for a block of groups; `scale`: where its scales are in a row."""
    (p, q, r, s), (h, i, j, k), (a, b, c, d) = rows, products, totals
    v = load_f32x8(x_scale)
    a, b = fma(to_f32(h), mul(load_scale(p + scale), v), a), fma(to_f32(i), mul(load_scale(q + scale), v), b)
    c, d = fma(to_f32(j), mul(load_scale(r + scale), v), c), fma(to_f32(k), mul(load_scale(s + scale), v), d)
    return a, b, c, d


@inline
def _block_q8(groups, load_scale, rows, at, quants, scale, x_scale, totals):
    """A block of groups whose integers begin at byte `at` of a row."""
    p, q, r, s = rows
    a, b, c, d = zeros_i32(), zeros_i32(), zeros_i32(), zeros_i32()
    e, f, g, h = zeros_i32(), zeros_i32(), zeros_i32(), zeros_i32()
    for i in range(at, at + 32 * groups, 32):
        low, high = load_i16x16(quants + 2 * (i - at)), load_i16x16(quants + 2 * (i - at) + 32)
        a, e = dot_i16(a, load_i8x16_as_i16(p + i), low), dot_i16(e, load_i8x16_as_i16(p + i + 16), high)
        b, f = dot_i16(b, load_i8x16_as_i16(q + i), low), dot_i16(f, load_i8x16_as_i16(q + i + 16), high)
        c, g = dot_i16(c, load_i8x16_as_i16(r + i), low), dot_i16(g, load_i8x16_as_i16(r + i + 16), high)
        d, h = dot_i16(d, load_i8x16_as_i16(s + i), low), dot_i16(h, load_i8x16_as_i16(s + i + 16), high)
    products = sum_pairs(a, e), sum_pairs(b, f), sum_pairs(c, g), sum_pairs(d, h)
    return _scaled(products, load_scale, rows, scale, x_scale, totals)


@inline
def _block_q4(groups, load_parameter, rows, at, quants, scale, minimum, x_scale, sums, totals):
    p, q, r, s = rows
    a, b, c, d = zeros_i32(), zeros_i32(), zeros_i32(), zeros_i32()
    for i in range(at, at + 16 * groups, 32):
        low, high = load_i8x32(quants + 2 * (i - at)), load_i8x32(quants + 2 * (i - at) + 32)
        packed = load_i8x32(p + i)
        a = dot_u4(dot_u4(a, low_nibbles(packed), low), high_nibbles(packed), high)
        packed = load_i8x32(q + i)
        b = dot_u4(dot_u4(b, low_nibbles(packed), low), high_nibbles(packed), high)
        packed = load_i8x32(r + i)
        c = dot_u4(dot_u4(c, low_nibbles(packed), low), high_nibbles(packed), high)
        packed = load_i8x32(s + i)
        d = dot_u4(dot_u4(d, low_nibbles(packed), low), high_nibbles(packed), high)
    products = settle(a), settle(b), settle(c), settle(d)
    a, b, c, d = _scaled(products, load_parameter, rows, scale, x_scale, totals)
    v = load_f32x8(sums)
    a, b = fma(load_parameter(p + minimum), v, a), fma(load_parameter(q + minimum), v, b)
    c, d = fma(load_parameter(r + minimum), v, c), fma(load_parameter(s + minimum), v, d)
    return a, b, c, d


@inline
def _four_q8(rows, soon, ask, columns, x):
    (wanted, share), quants, x_scale = ask, load_i64(x + QUANTS), load_i64(x + SCALES)
    groups, at, scale = columns // 32, ZERO, columns
    totals = splat_f32(0.0), splat_f32(0.0), splat_f32(0.0), splat_f32(0.0)
    for asked in range(0, share * (groups // 8), share):
        _ask_for(soon, asked, min(wanted, asked + share))
        totals = _block_q8(8, load_f16x8, rows, at, quants, scale, x_scale, totals)
        at, quants, scale, x_scale = at + 256, quants + 512, scale + 16, x_scale + 32
    _ask_for(soon, share * (groups // 8), wanted)
    if groups & 4:
        totals = _block_q8(4, load_f16x4, rows, at, quants, scale, x_scale, totals)
        at, quants, scale, x_scale = at + 128, quants + 256, scale + 8, x_scale + 32
    if groups & 2:
        totals = _block_q8(2, load_f16x2, rows, at, quants, scale, x_scale, totals)
    return totals


@inline
def _four_q4(rows, soon, ask, columns, x):
    (wanted, share), quants, x_scale = ask, load_i64(x + QUANTS), load_i64(x + SCALES)
    groups, at, scale, sums = columns // 32, ZERO, columns // 2, load_i64(x + SUMS)
    minimum = scale + 2 * groups
    totals = splat_f32(0.0), splat_f32(0.0), splat_f32(0.0), splat_f32(0.0)
    for asked in range(0, share * (groups // 8), share):
        _ask_for(soon, asked, min(wanted, asked + share))
        totals = _block_q4(8, load_f16x8, rows, at, quants, scale, minimum, x_scale, sums, totals)
        at, quants, scale, x_scale = at + 128, quants + 256, scale + 16, x_scale + 32
        minimum, sums = minimum + 16, sums + 32
    _ask_for(soon, share * (groups // 8), wanted)
    if groups & 4:
        totals = _block_q4(4, load_f16x4, rows, at, quants, scale, minimum, x_scale, sums, totals)
        at, quants, scale, x_scale = at + 64, quants + 128, scale + 8, x_scale + 32
        minimum, sums = minimum + 8, sums + 32
    if groups & 2:
        totals = _block_q4(2, load_f16x2, rows, at, quants, scale, minimum, x_scale, sums, totals)
    return totals


@inline
def _rows(matrix, stride, rows, i, j, k, m):
    """The addresses of four rows of a list."""
    return (
        matrix + stride * load_i32(rows + 4 * i),
        matrix + stride * load_i32(rows + 4 * j),
        matrix + stride * load_i32(rows + 4 * k),
        matrix + stride * load_i32(rows + 4 * m),
    )


@inline
def _lines(rows):
    """The first cache lines of four rows."""
    a, b, c, d = rows
    return a & -64, b & -64, c & -64, d & -64


@inline
def store_sums(p, q, r, s, a, b, c, d):
    """The sums of all lanes of four registers, to four addresses."""
    sums = sum_quarters(sum_halves(a, b), sum_halves(c, d))
    store_lane_0(p, sums)
    store_lane_1(q, sums)
    store_lane_2(r, sums)
    store_lane_3(s, sums)


@inline
def _gather_dot(four, block, matrix, stride, rows, soon, wanted, count, begin, end, x, out):
    """out[j] = row rows[j] . x for entries begin to end of each quarter of a list of `count` rows.

    A quarter has (count + 3) // 4 entries, the last ones fewer or none; what they lack is the list's last entry over
    again. Of rows that `soon` lists at the same places, the first `wanted` bytes are asked for, and so are those of the
    list's own first rows.
    """
    quarter, last, columns = (count + 3) // 4, count - 1, load_i64(x + COLUMNS)
    ask = asking(block, columns, wanted + 63)
    if begin == 0:
        begin_streams(matrix, stride, wanted, rows, count)
    for i in range(begin, end):
        j, k, m = min(quarter + i, last), min(2 * quarter + i, last), min(3 * quarter + i, last)
        later = _lines(_rows(matrix, stride, soon, i, j, k, m))
        a, b, c, d = four(_rows(matrix, stride, rows, i, j, k, m), later, ask, columns, x)
        store_sums(out + 4 * i, out + 4 * j, out + 4 * k, out + 4 * m, a, b, c, d)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_dot_f32(matrix, stride, rows, soon, wanted, count, begin, end, x, out):
    _gather_dot(_four_f32, FLOATS, matrix, stride, rows, soon, wanted, count, begin, end, x, out)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_dot_bf16(matrix, stride, rows, soon, wanted, count, begin, end, x, out):
    _gather_dot(_four_bf16, FLOATS, matrix, stride, rows, soon, wanted, count, begin, end, x, out)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_dot_q8(matrix, stride, rows, soon, wanted, count, begin, end, x, out):
    _gather_dot(_four_q8, INTEGERS, matrix, stride, rows, soon, wanted, count, begin, end, x, out)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def gather_dot_q4(matrix, stride, rows, soon, wanted, count, begin, end, x, out):
    _gather_dot(_four_q4, INTEGERS, matrix, stride, rows, soon, wanted, count, begin, end, x, out)
