"""Choosing a q4 group's integers, scale and minimum: `quantize.fit_q4`, compiled, since packing does it everywhere."""

import numpy as np
from numba import types

from fewfire.kernels.compile import inline, primitive
from fewfire.kernels.simd import (
    add,
    first_lane,
    load_f32,
    load_f32x8,
    max_lane,
    maximum,
    minimum,
    mul,
    rint,
    round_to_f16,
    splat_f32,
    store_f32,
    store_rounded_i8x8,
    subtract,
    sum_lanes,
)

_I = types.int64


@inline
def _round_to_f16(value):
    return first_lane(round_to_f16(splat_f32(value)))


@inline
def _levels(x, start, inverse):
    level = rint(mul(subtract(x, start), inverse))
    return minimum(maximum(level, splat_f32(0.0)), splat_f32(15.0))


@inline
def _sum4(a, b, c, d):
    return sum_lanes(add(add(a, b), add(c, d)))


@inline
def _error(x, level, scale, low):
    rest = subtract(subtract(x, mul(scale, level)), low)
    return mul(rest, rest)


@primitive(_I, _I, _I, _I, _I, _I, _I)
def fit_q4(values, groups, spans, span_count, integers, scales, minima):
    """values: float32 (groups, 32); spans: float32; integers: int8 (groups, 32); scales, minima: float32 (groups,)."""
    zero, n = splat_f32(0.0), np.float32(32.0)
    for g in range(groups):
        a, b = load_f32x8(values + 128 * g), load_f32x8(values + 128 * g + 32)
        c, d = load_f32x8(values + 128 * g + 64), load_f32x8(values + 128 * g + 96)
        high = max_lane(maximum(maximum(a, b), maximum(c, d)))
        low = -max_lane(
            maximum(maximum(subtract(zero, a), subtract(zero, b)), maximum(subtract(zero, c), subtract(zero, d)))
        )
        mean = _sum4(a, b, c, d) / n
        best = np.float32(np.inf)
        for k in range(span_count):
            step = max((high - low) * load_f32(spans + 4 * k) / np.float32(15.0), np.float32(1e-12))
            start = splat_f32((low + high) / np.float32(2.0) - step * np.float32(7.5))
            inverse = splat_f32(np.float32(1.0) / step)
            p, q, r, s = (
                _levels(a, start, inverse),
                _levels(b, start, inverse),
                _levels(c, start, inverse),
                _levels(d, start, inverse),
            )
            level = _sum4(p, q, r, s) / n
            centre, middle = splat_f32(level), splat_f32(mean)
            t, u, v, w = subtract(p, centre), subtract(q, centre), subtract(r, centre), subtract(s, centre)
            spread = _sum4(mul(t, t), mul(u, u), mul(v, v), mul(w, w))
            together = _sum4(
                mul(t, subtract(a, middle)),
                mul(u, subtract(b, middle)),
                mul(v, subtract(c, middle)),
                mul(w, subtract(d, middle)),
            )
            scale = _round_to_f16(together / max(spread, np.float32(1e-12)))
            offset = _round_to_f16(mean - scale * level)
            by, lowest = splat_f32(scale), splat_f32(offset)
            e, f = _error(a, p, by, lowest), _error(b, q, by, lowest)
            error = _sum4(e, f, _error(c, r, by, lowest), _error(d, s, by, lowest))
            if error < best:
                best = error
                store_f32(scales + 4 * g, scale)
                store_f32(minima + 4 * g, offset)
                store_rounded_i8x8(integers + 32 * g, p)
                store_rounded_i8x8(integers + 32 * g + 8, q)
                store_rounded_i8x8(integers + 32 * g + 16, r)
                store_rounded_i8x8(integers + 32 * g + 24, s)
