"""Matrix products for a batch of tokens, straight from the packed rows: what prefill is made of.

Dot rows meet four tokens at a time, so that a row is unpacked once for four; integers stay integers, as in `gather.py`.
Down rows are decoded to float32 in strips of 64 columns and go through a register-blocked product.
"""

from numba import types

from fewfire.kernels.compile import inline, primitive
from fewfire.kernels.gather import COLUMNS, LANES, QUANTS, SCALES, SUMS, VALUES
from fewfire.kernels.products import (
    dot_i16,
    dot_u4,
    high_nibbles,
    load_high_nibbles_as_f32,
    load_low_nibbles_as_f32,
    low_nibbles,
    settle,
    sum_pairs,
)
from fewfire.kernels.simd import (
    first_lane,
    fma,
    load_bf16x8,
    load_f16x2,
    load_f16x4,
    load_f16x8,
    load_f32x8,
    load_i8x8_as_f32,
    load_i8x16_as_i16,
    load_i8x32,
    load_i16x16,
    load_i64,
    mul,
    splat_f32,
    splat_f32_at,
    store_f32,
    store_f32x8,
    sum_lanes,
    to_f32,
    zeros_i32,
)

TOKENS = 4  # batches are padded to a multiple of this
STRIP = 64  # columns of a down row decoded at a time
_DEPTH = 64  # down rows decoded at a time

_I = types.int64


# --- one dot row . four tokens ----------------------------------------------------------------------------------------


@inline
def _four_float(load, step, row, x, t):
    a, b, c, d = splat_f32(0.0), splat_f32(0.0), splat_f32(0.0), splat_f32(0.0)
    columns = load_i64(x + COLUMNS)
    stride = 4 * columns
    at = load_i64(x + VALUES) + t * stride
    for i in range(columns // 8):
        w = load(row + step * i)
        a = fma(w, load_f32x8(at + 32 * i), a)
        b = fma(w, load_f32x8(at + 32 * i + stride), b)
        c = fma(w, load_f32x8(at + 32 * i + 2 * stride), c)
        d = fma(w, load_f32x8(at + 32 * i + 3 * stride), d)
    return sum_lanes(a), sum_lanes(b), sum_lanes(c), sum_lanes(d)


@inline
def _block_q8(row, quants, stride, groups):
    a, b, c, d = zeros_i32(), zeros_i32(), zeros_i32(), zeros_i32()
    e, f, g, h = zeros_i32(), zeros_i32(), zeros_i32(), zeros_i32()
    for i in range(0, 32 * groups, 32):
        low, high, at = load_i8x16_as_i16(row + i), load_i8x16_as_i16(row + i + 16), quants + 2 * i
        a, e = dot_i16(a, low, load_i16x16(at)), dot_i16(e, high, load_i16x16(at + 32))
        at += stride
        b, f = dot_i16(b, low, load_i16x16(at)), dot_i16(f, high, load_i16x16(at + 32))
        at += stride
        c, g = dot_i16(c, low, load_i16x16(at)), dot_i16(g, high, load_i16x16(at + 32))
        at += stride
        d, h = dot_i16(d, low, load_i16x16(at)), dot_i16(h, high, load_i16x16(at + 32))
    return to_f32(sum_pairs(a, e)), to_f32(sum_pairs(b, f)), to_f32(sum_pairs(c, g)), to_f32(sum_pairs(d, h))


@inline
def _block_q4(row, quants, stride, groups):
    a, b, c, d = zeros_i32(), zeros_i32(), zeros_i32(), zeros_i32()
    for i in range(0, 16 * groups, 32):
        packed, at = load_i8x32(row + i), quants + 2 * i
        low, high = low_nibbles(packed), high_nibbles(packed)
        a = dot_u4(dot_u4(a, low, load_i8x32(at)), high, load_i8x32(at + 32))
        b = dot_u4(dot_u4(b, low, load_i8x32(at + stride)), high, load_i8x32(at + stride + 32))
        c = dot_u4(dot_u4(c, low, load_i8x32(at + 2 * stride)), high, load_i8x32(at + 2 * stride + 32))
        d = dot_u4(dot_u4(d, low, load_i8x32(at + 3 * stride)), high, load_i8x32(at + 3 * stride + 32))
    return to_f32(settle(a)), to_f32(settle(b)), to_f32(settle(c)), to_f32(settle(d))


@inline
def _scaled(products, scale, x_scale, lanes, totals):
    a, b, c, d = totals
    p, q, r, s = products
    a = fma(p, mul(scale, load_f32x8(x_scale)), a)
    b = fma(q, mul(scale, load_f32x8(x_scale + lanes)), b)
    c = fma(r, mul(scale, load_f32x8(x_scale + 2 * lanes)), c)
    d = fma(s, mul(scale, load_f32x8(x_scale + 3 * lanes)), d)
    return a, b, c, d


@inline
def _with_minima(minimum, sums, lanes, totals):
    a, b, c, d = totals
    a, b = fma(minimum, load_f32x8(sums), a), fma(minimum, load_f32x8(sums + lanes), b)
    c, d = fma(minimum, load_f32x8(sums + 2 * lanes), c), fma(minimum, load_f32x8(sums + 3 * lanes), d)
    return a, b, c, d


@inline
def _four_q8(row, x, t):
    columns, lanes = load_i64(x + COLUMNS), 4 * load_i64(x + LANES)
    groups, scale, stride = columns // 32, row + columns, 2 * columns
    quants, x_scale = load_i64(x + QUANTS) + t * stride, load_i64(x + SCALES) + t * lanes
    totals = splat_f32(0.0), splat_f32(0.0), splat_f32(0.0), splat_f32(0.0)
    for _ in range(groups // 8):
        totals = _scaled(_block_q8(row, quants, stride, 8), load_f16x8(scale), x_scale, lanes, totals)
        row, quants, scale, x_scale = row + 256, quants + 512, scale + 16, x_scale + 32
    if groups & 4:
        totals = _scaled(_block_q8(row, quants, stride, 4), load_f16x4(scale), x_scale, lanes, totals)
        row, quants, scale, x_scale = row + 128, quants + 256, scale + 8, x_scale + 32
    if groups & 2:
        totals = _scaled(_block_q8(row, quants, stride, 2), load_f16x2(scale), x_scale, lanes, totals)
    a, b, c, d = totals
    return sum_lanes(a), sum_lanes(b), sum_lanes(c), sum_lanes(d)


@inline
def _four_q4(row, x, t):
    stride, lanes = load_i64(x + COLUMNS), 4 * load_i64(x + LANES)
    groups, scale = stride // 32, row + stride // 2
    quants, x_scale = load_i64(x + QUANTS) + t * stride, load_i64(x + SCALES) + t * lanes
    minimum, sums = scale + 2 * groups, load_i64(x + SUMS) + t * lanes
    totals = splat_f32(0.0), splat_f32(0.0), splat_f32(0.0), splat_f32(0.0)
    for _ in range(groups // 8):
        totals = _scaled(_block_q4(row, quants, stride, 8), load_f16x8(scale), x_scale, lanes, totals)
        totals = _with_minima(load_f16x8(minimum), sums, lanes, totals)
        row, quants, scale, x_scale = row + 128, quants + 256, scale + 16, x_scale + 32
        minimum, sums = minimum + 16, sums + 32
    if groups & 4:
        totals = _scaled(_block_q4(row, quants, stride, 4), load_f16x4(scale), x_scale, lanes, totals)
        totals = _with_minima(load_f16x4(minimum), sums, lanes, totals)
        row, quants, scale, x_scale = row + 64, quants + 128, scale + 8, x_scale + 32
        minimum, sums = minimum + 8, sums + 32
    if groups & 2:
        totals = _scaled(_block_q4(row, quants, stride, 2), load_f16x2(scale), x_scale, lanes, totals)
        totals = _with_minima(load_f16x2(minimum), sums, lanes, totals)
    a, b, c, d = totals
    return sum_lanes(a), sum_lanes(b), sum_lanes(c), sum_lanes(d)


@inline
def _four_f32(row, x, t):
    return _four_float(load_f32x8, 32, row, x, t)


@inline
def _four_bf16(row, x, t):
    return _four_float(load_bf16x8, 16, row, x, t)


@inline
def _dot_tokens(four, matrix, stride, count, x, tokens, out, out_stride):
    """out[t, i] = row i . x[t] for `count` neighbouring rows and all tokens, whose number is a multiple of 4.

    `matrix` is the first row's address; strides in bytes.
    """
    for t in range(0, tokens, TOKENS):
        at = out + t * out_stride
        for i in range(count):
            a, b, c, d = four(matrix + stride * i, x, t)
            store_f32(at + 4 * i, a)
            store_f32(at + 4 * i + out_stride, b)
            store_f32(at + 4 * i + 2 * out_stride, c)
            store_f32(at + 4 * i + 3 * out_stride, d)


@primitive(_I, _I, _I, _I, _I, _I, _I)
def dot_tokens_f32(matrix, stride, count, x, tokens, out, out_stride):
    _dot_tokens(_four_f32, matrix, stride, count, x, tokens, out, out_stride)


@primitive(_I, _I, _I, _I, _I, _I, _I)
def dot_tokens_bf16(matrix, stride, count, x, tokens, out, out_stride):
    _dot_tokens(_four_bf16, matrix, stride, count, x, tokens, out, out_stride)


@primitive(_I, _I, _I, _I, _I, _I, _I)
def dot_tokens_q8(matrix, stride, count, x, tokens, out, out_stride):
    _dot_tokens(_four_q8, matrix, stride, count, x, tokens, out, out_stride)


@primitive(_I, _I, _I, _I, _I, _I, _I)
def dot_tokens_q4(matrix, stride, count, x, tokens, out, out_stride):
    _dot_tokens(_four_q4, matrix, stride, count, x, tokens, out, out_stride)


# --- a strip of the down rows . all tokens ----------------------------------------------------------------------------


@inline
def _strip_float(load, step, row, strip, out):
    for i in range(8):
        store_f32x8(out + 32 * i, load(row + step * (8 * strip + i)))


@inline
def _strip_f32(row, columns, strip, out):
    _strip_float(load_f32x8, 32, row, strip, out)


@inline
def _strip_bf16(row, columns, strip, out):
    _strip_float(load_bf16x8, 16, row, strip, out)


@inline
def _strip_q8(row, columns, strip, out):
    for half in range(2):
        scale = splat_f32(first_lane(load_f16x2(row + columns + 4 * strip + 2 * half)))
        for i in range(4):
            store_f32x8(out + 32 * i, mul(scale, load_i8x8_as_f32(row + 64 * strip + 32 * half + 8 * i)))
        out += 128


@inline
def _half_q4(load, quants, scales, minima, out):
    scale, minimum = splat_f32(first_lane(load_f16x2(scales))), splat_f32(first_lane(load_f16x2(minima)))
    for i in range(4):
        store_f32x8(out + 32 * i, fma(scale, load(quants + 8 * i), minimum))


@inline
def _strip_q4(row, columns, strip, out):
    quants, scales = row + 32 * strip, row + columns // 2 + 4 * strip
    minima = scales + columns // 16
    _half_q4(load_low_nibbles_as_f32, quants, scales, minima, out)
    _half_q4(load_high_nibbles_as_f32, quants, scales + 2, minima + 2, out + 128)


@inline
def _multiply(panel, depth, h, h_stride, y, y_stride):
    """Four tokens, 16 columns: y += h . panel over `depth` rows of 64 floats."""
    a, b = load_f32x8(y), load_f32x8(y + 32)
    c, d = load_f32x8(y + y_stride), load_f32x8(y + y_stride + 32)
    e, f = load_f32x8(y + 2 * y_stride), load_f32x8(y + 2 * y_stride + 32)
    g, k = load_f32x8(y + 3 * y_stride), load_f32x8(y + 3 * y_stride + 32)
    for i in range(depth):
        low, high = load_f32x8(panel + 256 * i), load_f32x8(panel + 256 * i + 32)
        s = splat_f32_at(h + 4 * i)
        a, b = fma(s, low, a), fma(s, high, b)
        s = splat_f32_at(h + 4 * i + h_stride)
        c, d = fma(s, low, c), fma(s, high, d)
        s = splat_f32_at(h + 4 * i + 2 * h_stride)
        e, f = fma(s, low, e), fma(s, high, f)
        s = splat_f32_at(h + 4 * i + 3 * h_stride)
        g, k = fma(s, low, g), fma(s, high, k)
    store_f32x8(y, a)
    store_f32x8(y + 32, b)
    store_f32x8(y + y_stride, c)
    store_f32x8(y + y_stride + 32, d)
    store_f32x8(y + 2 * y_stride, e)
    store_f32x8(y + 2 * y_stride + 32, f)
    store_f32x8(y + 3 * y_stride, g)
    store_f32x8(y + 3 * y_stride + 32, k)


@inline
def _down_strip(read, matrix, stride, neurons, columns, strip, tokens, h, h_stride, panel, y, y_stride):
    """y[t, 64 strip : 64 strip + 64] = sum over neurons i of h[t, i] * down row i, for all tokens.

    `matrix` is the first down row's address, rows have `columns` (padded) columns; `tokens` is a multiple of 4; strides
    are in bytes; panel: 64 * 64 floats.
    """
    y += 256 * strip
    for t in range(tokens):
        for i in range(8):
            store_f32x8(y + t * y_stride + 32 * i, splat_f32(0.0))
    for start in range(0, neurons, _DEPTH):
        depth = min(_DEPTH, neurons - start)
        for i in range(depth):
            read(matrix + stride * (start + i), columns, strip, panel + 256 * i)
        for t in range(0, tokens, TOKENS):
            for part in range(4):
                _multiply(
                    panel + 64 * part, depth, h + t * h_stride + 4 * start, h_stride,
                    y + t * y_stride + 64 * part, y_stride,
                )  # fmt: skip


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def down_strip_f32(matrix, stride, neurons, columns, strip, tokens, h, h_stride, panel, y, y_stride):
    _down_strip(_strip_f32, matrix, stride, neurons, columns, strip, tokens, h, h_stride, panel, y, y_stride)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def down_strip_bf16(matrix, stride, neurons, columns, strip, tokens, h, h_stride, panel, y, y_stride):
    _down_strip(_strip_bf16, matrix, stride, neurons, columns, strip, tokens, h, h_stride, panel, y, y_stride)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def down_strip_q8(matrix, stride, neurons, columns, strip, tokens, h, h_stride, panel, y, y_stride):
    _down_strip(_strip_q8, matrix, stride, neurons, columns, strip, tokens, h, h_stride, panel, y, y_stride)


@primitive(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I)
def down_strip_q4(matrix, stride, neurons, columns, strip, tokens, h, h_stride, panel, y, y_stride):
    _down_strip(_strip_q4, matrix, stride, neurons, columns, strip, tokens, h, h_stride, panel, y, y_stride)
