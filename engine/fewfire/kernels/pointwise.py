"""Elementwise steps between the matrices: norms, activations, RoPE, and quantising a vector for the integer kernels.

Vectors are known by their addresses; they are float32, and buffers are padded with zeros to a multiple of 64 elements.
"""

import math

import numpy as np
from numba import types

from fewfire.kernels.compile import inline, primitive
from fewfire.kernels.gather import COLUMNS, LANES, QUANTS, SCALES, SCRATCH, SUMS, VALUES
from fewfire.kernels.products import dot_u4, settle
from fewfire.kernels.simd import (
    absolute,
    add,
    copy_4_bytes,
    copy_8_bytes,
    divide,
    fma,
    listed_f32x8,
    load_f32,
    load_f32x8,
    load_i8x32,
    load_i64,
    max_lane,
    maximum,
    minimum,
    mul,
    ones_i8,
    rint,
    splat_f32,
    store_f32,
    store_f32x8,
    store_rounded_i8x8,
    store_rounded_i16x8,
    subtract,
    sum_lanes,
    times_power_of_two,
    to_f32,
    where_beyond,
    where_over,
    zeros_i32,
)

_I = types.int64

SILU, GELU_TANH, RELU, RELU2 = range(4)  # the order of config.ACTIVATIONS, as far as these differ


@inline
def exp(x):
    """e**x of each lane, relative error under 2e-7; -inf and everything under -87 give about 1e-38. NaN stays NaN."""
    x = minimum(splat_f32(88.0), maximum(splat_f32(-87.0), x))
    n = rint(mul(x, splat_f32(1.4426950408889634)))
    r = fma(n, splat_f32(-0.693359375), x)  # ln 2 in two parts (Cody and Waite)
    r = fma(n, splat_f32(2.12194440e-4), r)
    p = splat_f32(1.9875691500e-4)  # minimax polynomial of Cephes' expf
    p = fma(p, r, splat_f32(1.3981999507e-3))
    p = fma(p, r, splat_f32(8.3334519073e-3))
    p = fma(p, r, splat_f32(4.1665795894e-2))
    p = fma(p, r, splat_f32(1.6666665459e-1))
    p = fma(p, r, splat_f32(5.0000001201e-1))
    p = fma(p, mul(r, r), add(r, splat_f32(1.0)))
    return times_power_of_two(p, n)


@inline
def _sigmoid(x):
    one = splat_f32(1.0)
    return divide(one, add(one, exp(subtract(splat_f32(0.0), x))))


@primitive(_I, _I, _I, _I, _I, _I, _I)
def activate(kind, values, count, centre, least, ids, row):
    """values[:count] = act(values[:count]) less the centres; up to 7 elements past the end are overwritten.

    What is then not over its threshold becomes zero: `centre[ids[j]]` and `least[ids[j]]` are those of entry j of every
    `row` entries, a multiple of 8 if there are several rows. `ids` goes on for up to 7 entries, whose centres and
    thresholds are read, too. No centres: `centre` is 0. No thresholds: `least` is 0.
    """
    end = values + 4 * count
    if kind == SILU:
        for at in range(values, end, 32):
            x = load_f32x8(at)
            store_f32x8(at, mul(x, _sigmoid(x)))
    elif kind == GELU_TANH:
        for at in range(values, end, 32):
            x = load_f32x8(at)
            inner = mul(x, fma(mul(x, x), splat_f32(0.044715), splat_f32(1.0)))
            # 0.5 (1 + tanh z) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
            store_f32x8(at, mul(x, _sigmoid(mul(inner, splat_f32(1.5957691216057308)))))
    elif kind == RELU2:
        for at in range(values, end, 32):
            x = maximum(load_f32x8(at), splat_f32(0.0))
            store_f32x8(at, mul(x, x))
    else:
        for at in range(values, end, 32):
            store_f32x8(at, where_over(load_f32x8(at), splat_f32(0.0)))
    if centre != 0:
        for start in range(values, end, 4 * row):
            for j in range(0, min(4 * row, end - start), 32):
                store_f32x8(start + j, subtract(load_f32x8(start + j), listed_f32x8(centre, ids + j)))
    if least != 0:
        for start in range(values, end, 4 * row):
            for j in range(0, min(4 * row, end - start), 32):
                store_f32x8(start + j, where_beyond(load_f32x8(start + j), listed_f32x8(least, ids + j)))


@primitive(_I, _I, types.float64, _I, _I)
def rms_norm(x, weight, eps, count, out):
    """out = x / sqrt(mean(x^2) + eps) * weight (1910.07467); out may be x."""
    total, whole = splat_f32(0.0), 4 * (count - count % 8)
    for i in range(0, whole, 32):
        v = load_f32x8(x + i)
        total = fma(v, v, total)
    squares = np.float64(sum_lanes(total))
    for i in range(whole, 4 * count, 4):
        squares += load_f32(x + i) * load_f32(x + i)
    inverse = np.float32(1.0 / math.sqrt(squares / count + eps))
    for i in range(0, whole, 32):
        store_f32x8(out + i, mul(mul(load_f32x8(x + i), splat_f32(inverse)), load_f32x8(weight + i)))
    for i in range(whole, 4 * count, 4):
        store_f32(out + i, load_f32(x + i) * inverse * load_f32(weight + i))


@primitive(_I, _I, _I, types.float64, _I, _I)
def layer_norm(x, weight, bias, eps, count, out):
    """out = (x - mean) / sqrt(var + eps) * weight + bias (1607.06450)."""
    mean = np.float64(0.0)
    for i in range(0, 4 * count, 4):
        mean += load_f32(x + i)
    mean /= count
    variance = np.float64(0.0)
    for i in range(0, 4 * count, 4):
        variance += (load_f32(x + i) - mean) ** 2
    inverse = 1.0 / math.sqrt(variance / count + eps)
    for i in range(0, 4 * count, 4):
        store_f32(out + i, (load_f32(x + i) - mean) * inverse * load_f32(weight + i) + load_f32(bias + i))


@inline
def _quantize(x, t, largest_integer, size, store, copy):
    """Fills in the integers of vector t of an activation from its float32 values, in groups of 32.

    A group's scale is its largest |value| / `largest_integer`; an integer takes `size` bytes. A block is up to eight
    groups; within it the integers are interleaved in fours as in the rows (see `gather.py`). Returns the address of the
    vector's integers.
    """
    columns, lanes = load_i64(x + COLUMNS), 4 * load_i64(x + LANES)
    values, first = load_i64(x + VALUES) + 4 * t * columns, load_i64(x + QUANTS) + size * t * columns
    scales, plain = load_i64(x + SCALES) + t * lanes, load_i64(x + SCRATCH) + 512 * t
    groups, quants, top = columns // 32, first, np.float32(largest_integer)
    while groups > 0:
        block = 8 if groups >= 8 else (4 if groups >= 4 else 2)
        spread = 8 // block  # lanes per group
        for g in range(block):
            a, b = load_f32x8(values), load_f32x8(values + 32)
            c, d = load_f32x8(values + 64), load_f32x8(values + 96)
            largest = max_lane(maximum(maximum(absolute(a), absolute(b)), maximum(absolute(c), absolute(d))))
            inverse, at = splat_f32(top / largest if largest > 0.0 else np.float32(0.0)), plain + 32 * size * g
            store(at, mul(a, inverse))
            store(at + 8 * size, mul(b, inverse))
            store(at + 16 * size, mul(c, inverse))
            store(at + 24 * size, mul(d, inverse))
            for lane in range(spread):
                store_f32(scales + 4 * (spread * g + lane), largest / top)
            values += 128
        for v in range(block):
            for lane in range(8):
                copy(quants + size * (32 * v + 4 * lane), plain + 4 * size * (lane * block + v))
        quants, scales, groups = quants + 32 * size * block, scales + 32, groups - block
    return first


@primitive(_I, _I)
def quantize_q8(x, t):
    """The int16 side of vector t of an activation, for q8 rows: scale = largest |value| / 32767."""
    _quantize(x, t, 32767, 2, store_rounded_i16x8, copy_8_bytes)


@primitive(_I, _I)
def quantize_q4(x, t):
    """The int8 side, for q4 rows: scale = largest |value| / 127; with each lane's scale times its sum of integers."""
    quants = _quantize(x, t, 127, 1, store_rounded_i8x8, copy_4_bytes)
    groups, lanes = load_i64(x + COLUMNS) // 32, 4 * load_i64(x + LANES)
    scales, sums = load_i64(x + SCALES) + t * lanes, load_i64(x + SUMS) + t * lanes
    while groups > 0:
        block = 8 if groups >= 8 else (4 if groups >= 4 else 2)
        total = zeros_i32()
        for v in range(block):
            total = dot_u4(total, ones_i8(), load_i8x32(quants + 32 * v))
        store_f32x8(sums, mul(to_f32(settle(total)), load_f32x8(scales)))
        quants, scales, sums, groups = quants + 32 * block, scales + 32, sums + 32, groups - block


@primitive(_I, _I, _I, _I)
def rotate(vector, cos, sin, half):
    """RoPE of one head in place, pairing element i with i + half (2104.09864, the layout of transformers)."""
    for i in range(0, 4 * half, 4):
        a, b = load_f32(vector + i), load_f32(vector + i + 4 * half)
        store_f32(vector + i, a * load_f32(cos + i) - b * load_f32(sin + i))
        store_f32(vector + i + 4 * half, b * load_f32(cos + i) + a * load_f32(sin + i))
