"""Dot products of all the rows of a coded matrix with one vector, in integers from beginning to end.

A row is what `selectors/codes.py` makes of it: its first 64 columns as 32 bytes of two, 0 to 15, and then 32 bytes for
each 128 columns, 0 to 3: plane k, bits 2 k and 2 k + 1 of the bytes, has columns 32 k to 32 k + 31. What they stand for
lies around zero, `MIDDLE` lower, which is the same for all rows. There is one scale for a row, and one for the vector,
so that nothing but integers is added up here, and no list is looked at: a row is short, and anything else would take
longer than its arithmetic (perf/LOG.md, "a head in two bits").
"""

import numpy as np
from numba import types

from fewfire.kernels.compile import inline, primitive, step
from fewfire.kernels.gather import store_sums
from fewfire.kernels.products import dot_u4, high_nibbles, low_nibbles, low_pairs, settle, without_low_pairs
from fewfire.kernels.simd import (
    absolute,
    add_i32,
    fma,
    load_f32x8,
    load_i8x32,
    max_lane,
    maximum,
    mul,
    prefetch,
    rint,
    splat_f32,
    store_f32,
    store_rounded_i8x8,
    sum_lanes,
    to_f32,
    zeros_i32,
)

_I = types.int64
FINE = 64  # columns in four bits
FINE_MIDDLE, MIDDLE = 7.5, 1.5  # of the integers of these, and of the others
_AHEAD = 1024  # bytes from what is read to what is asked for


@inline
def _fine(packed, low, high):
    return settle(dot_u4(dot_u4(zeros_i32(), low_nibbles(packed), low), high_nibbles(packed), high))


@inline
def _coarse(packed, x):
    (first, second, third, fourth), higher = x, high_nibbles(packed)
    acc = dot_u4(dot_u4(zeros_i32(), low_pairs(packed), first), low_pairs(without_low_pairs(packed)), second)
    return settle(dot_u4(dot_u4(acc, low_pairs(higher), third), without_low_pairs(higher), fourth))


@step
def narrow(values, columns, x, scale):
    """Of float32 values `(columns,)` the vector x int8 that rows meet, its scale, and behind it what products are too
    large by: x times the middles of the rows' integers."""
    largest, total = splat_f32(0.0), splat_f32(0.0)
    for i in range(0, 4 * columns, 32):
        largest = maximum(absolute(load_f32x8(values + i)), largest)
    unit = max(max_lane(largest) / np.float32(127.0), np.float32(1e-30))
    inverse = splat_f32(np.float32(1.0) / unit)
    for i in range(0, 4 * columns, 32):
        value = rint(mul(load_f32x8(values + i), inverse))
        store_rounded_i8x8(x + i // 4, value)
        total = fma(value, splat_f32(FINE_MIDDLE if i < 4 * FINE else MIDDLE), total)
    store_f32(scale, unit)
    store_f32(scale + 4, sum_lanes(total))


@primitive(_I, _I, _I, _I, _I)
def dot_codes(codes, stride, count, x, out):
    """out[j] = sum of row j's integers times those of x, for `count` rows; x int8 (columns,), out float32 (count,)."""
    quarter = (count + 3) // 4
    second, third, fourth = min(quarter, count - quarter), min(2 * quarter, count - quarter), count - quarter
    p, q, r, s = codes, codes + stride * second, codes + stride * third, codes + stride * fourth
    for i in range(out, out + 4 * quarter, 4):
        for line in range(_AHEAD, _AHEAD + stride, 64):
            prefetch(p + line)
            prefetch(q + line)
            prefetch(r + line)
            prefetch(s + line)
        low, high = load_i8x32(x), load_i8x32(x + 32)
        a, b = _fine(load_i8x32(p), low, high), _fine(load_i8x32(q), low, high)
        c, d = _fine(load_i8x32(r), low, high), _fine(load_i8x32(s), low, high)
        y = x + FINE
        for at in range(FINE // 2, stride, 32):
            z = load_i8x32(y), load_i8x32(y + 32), load_i8x32(y + 64), load_i8x32(y + 96)
            a, b = add_i32(a, _coarse(load_i8x32(p + at), z)), add_i32(b, _coarse(load_i8x32(q + at), z))
            c, d = add_i32(c, _coarse(load_i8x32(r + at), z)), add_i32(d, _coarse(load_i8x32(s + at), z))
            y += 128
        places = i, i + 4 * second, i + 4 * third, i + 4 * fourth
        store_sums(*places, to_f32(a), to_f32(b), to_f32(c), to_f32(d))
        p, q, r, s = p + stride, q + stride, r + stride, s + stride
