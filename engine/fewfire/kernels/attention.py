"""Attention of one query head over the cached keys and values of its group.

A cache is `(layers, kv_heads, capacity, head_dim)`, head_dim padded with zeros to a multiple of 8, in float32 or float16
(as uint16). Its dtype selects the loads.
"""

import numpy as np
from numba.core import types
from numba.extending import overload

from fewfire.kernels.compile import inline
from fewfire.kernels.pointwise import exp
from fewfire.kernels.simd import (
    add,
    fma,
    load_f16x8,
    load_f32x8,
    mul,
    splat_f32,
    splat_f32_at,
    store_f16x8,
    store_f32x8,
    subtract,
    sum_lanes,
)

_OPTIONS = {"forceinline": True, "error_model": "numpy", "boundscheck": False}


def load_8(cache, at):
    """8 elements of a cache as float32."""
    raise NotImplementedError


@overload(load_8, jit_options=_OPTIONS)
def _load_8(cache, at):
    if cache.dtype == types.float32:
        return lambda cache, at: load_f32x8(at)
    return lambda cache, at: load_f16x8(at)


def store_8(cache, at, value):
    """8 elements into a cache."""
    raise NotImplementedError


@overload(store_8, jit_options=_OPTIONS)
def _store_8(cache, at, value):
    if cache.dtype == types.float32:
        return lambda cache, at, value: store_f32x8(at, value)
    return lambda cache, at, value: store_f16x8(at, value)


@inline
def position_address(cache, layer, head, position):
    """Where a position's key or value begins."""
    _, heads, capacity, width = cache.shape
    return cache.ctypes.data + ((layer * heads + head) * capacity + position) * width * cache.itemsize


@inline
def remember(cache, layer, head, position, vector):
    """Writes one head's key or value; `vector` is padded to the cache's width."""
    at = position_address(cache, layer, head, position)
    for i in range(0, cache.shape[3], 8):
        store_8(cache, at + i * cache.itemsize, load_f32x8(vector.ctypes.data + 4 * i))


@inline
def _softmax(scores, count):
    """scores[:count] = exp(scores - max); returns 1 / their sum. Pads to a multiple of 8 with zeros."""
    largest = np.float32(-np.inf)
    for p in range(count):
        largest = max(largest, scores[p])
    for p in range(count, (count + 7) // 8 * 8):
        scores[p] = np.float32(-np.inf)
    total = splat_f32(0.0)
    at = scores.ctypes.data
    for i in range(0, 4 * count, 32):
        weight = exp(subtract(load_f32x8(at + i), splat_f32(largest)))
        store_f32x8(at + i, weight)
        total = add(total, weight)
    return np.float32(1.0) / sum_lanes(total)


@inline
def attend(keys, values, layer, head, start, stop, query, scale, scores, out):
    """out = softmax(scale * query . keys) values over the positions start <= p < stop of one cached head.

    query, out: (width,) float32, width that of the cache; scores: room for stop - start floats rounded up to 8.
    """
    width, size = keys.shape[3], keys.itemsize
    q, count = query.ctypes.data, stop - start
    at = position_address(keys, layer, head, start)
    for p in range(count):
        acc = splat_f32(0.0)
        for i in range(0, width, 8):
            acc = fma(load_f32x8(q + 4 * i), load_8(keys, at + i * size), acc)
        scores[p] = sum_lanes(acc) * scale
        at += width * size
    inverse = splat_f32(_softmax(scores, count))
    weight, y = scores.ctypes.data, out.ctypes.data
    for i in range(0, width, 8):
        store_f32x8(y + 4 * i, splat_f32(0.0))
    at, row = position_address(values, layer, head, start), width * size
    for p in range(0, count - 3, 4):  # four positions for each pass over `out`
        w0, w1 = splat_f32_at(weight + 4 * p), splat_f32_at(weight + 4 * p + 4)
        w2, w3 = splat_f32_at(weight + 4 * p + 8), splat_f32_at(weight + 4 * p + 12)
        for i in range(0, width, 8):
            cell = at + i * size
            s = fma(w0, load_8(values, cell), load_f32x8(y + 4 * i))
            s = fma(w1, load_8(values, cell + row), s)
            s = fma(w2, load_8(values, cell + 2 * row), s)
            store_f32x8(y + 4 * i, fma(w3, load_8(values, cell + 3 * row), s))
        at += 4 * row
    for p in range(count - count % 4, count):
        w0 = splat_f32_at(weight + 4 * p)
        for i in range(0, width, 8):
            store_f32x8(y + 4 * i, fma(w0, load_8(values, at + i * size), load_f32x8(y + 4 * i)))
        at += row
    for i in range(0, width, 8):
        store_f32x8(y + 4 * i, mul(inverse, load_f32x8(y + 4 * i)))
