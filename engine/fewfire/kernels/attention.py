"""Attention of one query head over the cached keys and values of its group.

One head's cache is `(positions, width)` in float32 or float16, width being head_dim padded to a multiple of 8.
"""

import numpy as np
from numba import types

from fewfire.kernels.compile import inline, primitive
from fewfire.kernels.pointwise import exp
from fewfire.kernels.simd import (
    add,
    fma,
    load_f16x8,
    load_f32,
    load_f32x8,
    mul,
    splat_f32,
    splat_f32_at,
    store_f16x8,
    store_f32,
    store_f32x8,
    subtract,
    sum_lanes,
)

_I = types.int64


@inline
def _softmax(scores, count):
    """scores[:count] = exp(scores - max); returns 1 / their sum. Pads to a multiple of 8 with zeros."""
    largest = np.float32(-np.inf)
    for p in range(0, 4 * count, 4):
        largest = max(largest, load_f32(scores + p))
    for p in range(count, (count + 7) // 8 * 8):
        store_f32(scores + 4 * p, np.float32(-np.inf))
    total = splat_f32(0.0)
    for i in range(0, 4 * count, 32):
        weight = exp(subtract(load_f32x8(scores + i), splat_f32(largest)))
        store_f32x8(scores + i, weight)
        total = add(total, weight)
    return np.float32(1.0) / sum_lanes(total)


@inline
def _attend(load, size, keys, values, start, stop, query, scale, scores, out, width):
    count, row = stop - start, width * size
    at = keys + start * row
    for p in range(count):
        acc = splat_f32(0.0)
        for i in range(0, width, 8):
            acc = fma(load_f32x8(query + 4 * i), load(at + i * size), acc)
        store_f32(scores + 4 * p, sum_lanes(acc) * np.float32(scale))
        at += row
    inverse = splat_f32(_softmax(scores, count))
    for i in range(0, width, 8):
        store_f32x8(out + 4 * i, splat_f32(0.0))
    at = values + start * row
    for p in range(0, count - 3, 4):  # four positions for each pass over `out`
        w0, w1 = splat_f32_at(scores + 4 * p), splat_f32_at(scores + 4 * p + 4)
        w2, w3 = splat_f32_at(scores + 4 * p + 8), splat_f32_at(scores + 4 * p + 12)
        for i in range(0, width, 8):
            cell = at + i * size
            s = fma(w0, load(cell), load_f32x8(out + 4 * i))
            s = fma(w1, load(cell + row), s)
            s = fma(w2, load(cell + 2 * row), s)
            store_f32x8(out + 4 * i, fma(w3, load(cell + 3 * row), s))
        at += 4 * row
    for p in range(count - count % 4, count):
        w0 = splat_f32_at(scores + 4 * p)
        for i in range(0, width, 8):
            store_f32x8(out + 4 * i, fma(w0, load(at + i * size), load_f32x8(out + 4 * i)))
        at += row
    for i in range(0, width, 8):
        store_f32x8(out + 4 * i, mul(inverse, load_f32x8(out + 4 * i)))


@primitive(_I, _I, _I, _I, _I, types.float64, _I, _I, _I)
def attend_f32(keys, values, start, stop, query, scale, scores, out, width):
    """out = softmax(scale * query . keys) values over the positions start <= p < stop of one cached head.

    keys, values: addresses of position 0; query, out: (width,) float32; scores: scratch of stop - start + 8 floats.
    """
    _attend(load_f32x8, 4, keys, values, start, stop, query, scale, scores, out, width)


@primitive(_I, _I, _I, _I, _I, types.float64, _I, _I, _I)
def attend_f16(keys, values, start, stop, query, scale, scores, out, width):
    """The same over a float16 cache."""
    _attend(load_f16x8, 2, keys, values, start, stop, query, scale, scores, out, width)


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
