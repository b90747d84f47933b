"""Attention over one cached head: up to four queries at once over a range of positions, and ranges put together.

One head's cache is `(positions, width)` in float32 or float16, width being head_dim padded to a multiple of 8. What
a query finds in a range, its *part*, is `width + 8` floats: the values weighted with exp(score - largest), `largest`,
and the sum of these weights. Parts are merged (online softmax, 1805.02867) in the order of the positions, and ranges
depend on positions alone, so that results do not depend on who computed which. While a range's keys meet the queries
its values are asked for, and the keys behind (perf/LOG.md, "keys and values are asked for").
"""

import numpy as np
from numba import types

from fewfire.kernels.compile import inline, primitive
from fewfire.kernels.gather import ask_for_row
from fewfire.kernels.pointwise import exp
from fewfire.kernels.simd import (
    add,
    first_lane,
    fma,
    load_f32,
    load_f32x8,
    maximum,
    mul,
    prefetch,
    splat_f32,
    store_f16x8,
    store_f32,
    store_f32x8,
    subtract,
    swap_halves,
)
from fewfire.kernels.tile import (
    QUERIES,
    beside,
    dots_f16_1,
    dots_f16_2,
    dots_f16_3,
    dots_f16_4,
    dots_f32_1,
    dots_f32_2,
    dots_f32_3,
    dots_f32_4,
    mix_f16_1,
    mix_f16_2,
    mix_f16_3,
    mix_f16_4,
    mix_f32_1,
    mix_f32_2,
    mix_f32_3,
    mix_f32_4,
)

_I = types.int64
_ATTEND = (_I, _I, _I, _I, _I, _I, _I, _I, types.float64, _I, _I, _I, _I)
_FEW, _FULL = beside(1), beside(QUERIES)

RANGE = 128  # positions, beginning at its multiples: 16 kB of f16 keys of 64 elements, half the first-level cache
SCORES = QUERIES * (RANGE + 4)  # floats of scratch
_AHEAD = 1024  # bytes of keys that are asked for ahead of time
EVERYTHING = 1 << 40  # a window that hides nothing


@inline
def _hide(scores, start, stop, last, window, queries):
    """-inf for the positions that a query does not see."""
    for p in range(start, min(stop, last + queries - 1 - window)):
        for q in range(queries):
            if p < last + q - window:
                store_f32(scores + 16 * (p - start) + 4 * q, -np.inf)
    for p in range(max(start, last), stop):
        for q in range(queries):
            if p >= last + q:
                store_f32(scores + 16 * (p - start) + 4 * q, -np.inf)


@inline
def _softmax(scores, count):
    """scores[:count] = exp(scores - their largest) for each query; the largest and the sums are left behind them."""
    end = scores + 16 * count
    store_f32x8(end, splat_f32(-np.inf))  # for an odd count
    largest = splat_f32(-np.inf)
    for at in range(scores, end, 32):
        largest = maximum(largest, load_f32x8(at))
    largest, total = maximum(largest, swap_halves(largest)), splat_f32(0.0)
    for at in range(scores, end, 32):
        weight = exp(subtract(load_f32x8(at), largest))
        store_f32x8(at, weight)
        total = add(total, weight)
    store_f32x8(end, largest)
    store_f32x8(end + 16, add(total, swap_halves(total)))


@inline
def _attend(
    dots, mix, queries, at_once, size,
    keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width,
):  # fmt: skip
    count, row = stop - start, width * size
    keys, values = keys + start * row, values + start * row
    # The last keys are taken together with some before them, few keys one by one: the tile then has the same key
    # several times. So with the pieces of values.
    step, pitch = (at_once, row) if count >= at_once else (1, 0)
    ask_for_row(keys, _AHEAD)
    for p in range(0, count, step):
        p = min(p, count - step)
        for at in range(p * row, (p + step) * row, 64):
            prefetch(keys + at + _AHEAD)
            prefetch(values + at)
        dots((query, stride, keys + p * row, pitch, width, scale, scores + 16 * p))
    _hide(scores, start, stop, last, window, queries)
    _softmax(scores, count)
    step, pitch = (8 * at_once, 8 * size) if width >= 8 * at_once else (8, 0)
    for i in range(0, width, step):
        i = min(i, width - step)
        mix((scores, values + i * size, row, count, pitch, out + 4 * i, out_stride))
    for q in range(queries):
        part, found = out + q * out_stride + 4 * width, scores + 16 * count + 4 * q
        store_f32(part, load_f32(found))
        store_f32(part + 4, load_f32(found + 16))


@primitive(*_ATTEND)
def attend_f16_4(keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width):
    """Parts of four queries, `stride` bytes apart, over the positions start <= p < stop of one cached head.

    At most `RANGE` positions, of which query q sees last + q - window <= p < last + q. keys, values: addresses of
    position 0; scores: scratch of `SCORES` floats; out: the first query's part, the others following at `out_stride`
    bytes. The part of a query that sees none of the positions is undefined.
    """
    _attend(
        dots_f16_4, mix_f16_4, 4, _FULL, 2,
        keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width,
    )  # fmt: skip


@primitive(*_ATTEND)
def attend_f16_3(keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width):
    """The same for three queries."""
    _attend(
        dots_f16_3, mix_f16_3, 3, _FEW, 2,
        keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width,
    )  # fmt: skip


@primitive(*_ATTEND)
def attend_f16_2(keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width):
    """The same for two queries."""
    _attend(
        dots_f16_2, mix_f16_2, 2, _FEW, 2,
        keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width,
    )  # fmt: skip


@primitive(*_ATTEND)
def attend_f16_1(keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width):
    """The same for one query."""
    _attend(
        dots_f16_1, mix_f16_1, 1, _FEW, 2,
        keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width,
    )  # fmt: skip


@primitive(*_ATTEND)
def attend_f32_4(keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width):
    """The same for four queries over a float32 cache."""
    _attend(
        dots_f32_4, mix_f32_4, 4, _FULL, 4,
        keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width,
    )  # fmt: skip


@primitive(*_ATTEND)
def attend_f32_3(keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width):
    """The same for three queries over a float32 cache."""
    _attend(
        dots_f32_3, mix_f32_3, 3, _FEW, 4,
        keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width,
    )  # fmt: skip


@primitive(*_ATTEND)
def attend_f32_2(keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width):
    """The same for two queries over a float32 cache."""
    _attend(
        dots_f32_2, mix_f32_2, 2, _FEW, 4,
        keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width,
    )  # fmt: skip


@primitive(*_ATTEND)
def attend_f32_1(keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width):
    """The same for one query over a float32 cache."""
    _attend(
        dots_f32_1, mix_f32_1, 1, _FEW, 4,
        keys, values, start, stop, last, window, query, stride, scale, scores, out, out_stride, width,
    )  # fmt: skip


@primitive(_I, _I, _I)
def merge(part, other, width):
    """Adds a query's part over another range to the one over the ranges before it."""
    end, others = part + 4 * width, other + 4 * width
    ours, theirs = splat_f32(load_f32(end)), splat_f32(load_f32(others))
    largest = maximum(ours, theirs)
    a, b = exp(subtract(ours, largest)), exp(subtract(theirs, largest))
    for i in range(0, 4 * width, 32):
        store_f32x8(part + i, fma(a, load_f32x8(part + i), mul(b, load_f32x8(other + i))))
    store_f32(end, first_lane(largest))
    store_f32(end + 4, first_lane(a) * load_f32(end + 4) + first_lane(b) * load_f32(others + 4))


@primitive(_I, _I, _I, _I)
def settle(part, width, count, out):
    """out[:count] = the weighted mean of the values that a query's part is about."""
    inverse = np.float32(1.0) / load_f32(part + 4 * width + 4)
    whole = count - count % 8
    for i in range(0, 4 * whole, 32):
        store_f32x8(out + i, mul(splat_f32(inverse), load_f32x8(part + i)))
    for i in range(4 * whole, 4 * count, 4):
        store_f32(out + i, inverse * load_f32(part + i))


@primitive(_I, _I, _I)
def remember_f32(cell, vector, width):
    """Writes one head's key or value of one position into its cell of the cache."""
    for i in range(0, width, 8):
        store_f32x8(cell + 4 * i, load_f32x8(vector + 4 * i))


@primitive(_I, _I, _I)
def remember_f16(cell, vector, width):
    """The same into a float16 cache."""
    for i in range(0, width, 8):
        store_f16x8(cell + 2 * i, load_f32x8(vector + 4 * i))
