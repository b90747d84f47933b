"""Elementwise steps between the matrices: norms, activations, RoPE, and quantising a vector for the integer kernels.

Vectors are float32 and padded with zeros to a multiple of 64 elements.
"""

import math

import numpy as np

from fewfire.kernels.compile import inline
from fewfire.kernels.simd import (
    absolute,
    add,
    copy_4_bytes,
    divide,
    dot_s8,
    fma,
    load_f32x8,
    load_i8x32,
    max_lane,
    maximum,
    minimum,
    mul,
    ones_i8,
    rint,
    splat_f32,
    store_f32x8,
    store_i32x8,
    store_rounded_i8x8,
    subtract,
    sum_lanes,
    times_8,
    times_power_of_two,
    where_over,
    zeros_i32,
)

SILU, GELU_TANH, RELU, RELU2, FATRELU = range(5)  # the order of config.ACTIVATIONS


@inline
def exp(x):
    """e**x of each lane, relative error under 2e-7; -inf and everything under -87 give about 1e-38."""
    x = minimum(maximum(x, splat_f32(-87.0)), splat_f32(88.0))
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


@inline
def activate(kind, threshold, values, count):
    """values[:count] = act(values[:count]); up to 7 elements past the end are overwritten."""
    at = values.ctypes.data
    if kind == SILU:
        for i in range(0, 4 * count, 32):
            x = load_f32x8(at + i)
            store_f32x8(at + i, mul(x, _sigmoid(x)))
    elif kind == GELU_TANH:
        for i in range(0, 4 * count, 32):
            x = load_f32x8(at + i)
            inner = mul(x, fma(mul(x, x), splat_f32(0.044715), splat_f32(1.0)))
            # 0.5 (1 + tanh z) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
            store_f32x8(at + i, mul(x, _sigmoid(mul(inner, splat_f32(1.5957691216057308)))))
    elif kind == RELU2:
        for i in range(0, 4 * count, 32):
            x = maximum(load_f32x8(at + i), splat_f32(0.0))
            store_f32x8(at + i, mul(x, x))
    else:  # relu, and relu over a threshold
        for i in range(0, 4 * count, 32):
            store_f32x8(at + i, where_over(load_f32x8(at + i), splat_f32(threshold)))


@inline
def rms_norm(x, weight, eps, count, out):
    """out = x / sqrt(mean(x^2) + eps) * weight (1910.07467)."""
    total = splat_f32(0.0)
    for i in range(0, 4 * (count - count % 8), 32):
        v = load_f32x8(x.ctypes.data + i)
        total = fma(v, v, total)
    squares = sum_lanes(total)
    for i in range(count - count % 8, count):
        squares += x[i] * x[i]
    inverse = np.float32(1.0 / math.sqrt(squares / count + eps))
    for i in range(count):
        out[i] = x[i] * inverse * weight[i]


@inline
def layer_norm(x, weight, bias, eps, count, out):
    """out = (x - mean) / sqrt(var + eps) * weight + bias (1607.06450)."""
    mean = np.float64(0.0)
    for i in range(count):
        mean += x[i]
    mean /= count
    variance = np.float64(0.0)
    for i in range(count):
        variance += (x[i] - mean) ** 2
    inverse = np.float32(1.0 / math.sqrt(variance / count + eps))
    for i in range(count):
        out[i] = (x[i] - np.float32(mean)) * inverse * weight[i] + bias[i]


@inline
def norm(x, weights, biases, layer, eps, count, out):
    """The layer's norm: LayerNorm where the model has norm biases, RMS norm where it has none."""
    if biases.shape[0] > 0:
        layer_norm(x, weights[layer], biases[layer], eps, count, out)
    else:
        rms_norm(x, weights[layer], eps, count, out)


@inline
def quantize(x):
    """Fills in the int8 side of an `Activation` from its float32 values: groups of 32, scale = largest |value| / 127.

    A block is up to eight groups; within it the bytes are interleaved in fours as in the rows (see `gather.py`).
    """
    groups = x.quants.size // 32
    values, quants, plain = x.values.ctypes.data, x.quants.ctypes.data, x.scratch.ctypes.data
    sums = x.sums.ctypes.data
    first_lane = 0
    while groups > 0:
        block = 8 if groups >= 8 else (4 if groups >= 4 else 2)
        spread = 8 // block  # lanes per group
        for g in range(block):
            a, b = load_f32x8(values), load_f32x8(values + 32)
            c, d = load_f32x8(values + 64), load_f32x8(values + 96)
            largest = max_lane(maximum(maximum(absolute(a), absolute(b)), maximum(absolute(c), absolute(d))))
            scale = largest / np.float32(127.0)
            inverse = splat_f32(np.float32(127.0) / largest if largest > 0.0 else np.float32(0.0))
            store_rounded_i8x8(plain + 32 * g, mul(a, inverse))
            store_rounded_i8x8(plain + 32 * g + 8, mul(b, inverse))
            store_rounded_i8x8(plain + 32 * g + 16, mul(c, inverse))
            store_rounded_i8x8(plain + 32 * g + 24, mul(d, inverse))
            for lane in range(spread):
                x.scales[first_lane + spread * g + lane] = scale
            values += 128
        total = zeros_i32()
        for v in range(block):
            for lane in range(8):
                copy_4_bytes(quants + 32 * v + 4 * lane, plain + 4 * (lane * block + v))
            total = dot_s8(total, ones_i8(), load_i8x32(quants + 32 * v))
        store_i32x8(sums, times_8(total))
        quants, sums, first_lane, groups = quants + 32 * block, sums + 32, first_lane + 8, groups - block


@inline
def rotate(vector, cos, sin):
    """RoPE of one head in place, pairing element i with i + head_dim / 2 (2104.09864, the layout of transformers)."""
    half = cos.size
    for i in range(half):
        a, b = vector[i], vector[i + half]
        vector[i] = a * cos[i] - b * sin[i]
        vector[i + half] = b * cos[i] + a * sin[i]
