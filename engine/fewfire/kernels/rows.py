"""Reading one dot row as float32: the embedding of a token."""

import numpy as np
from numba import types

from fewfire.kernels.compile import inline, primitive
from fewfire.kernels.simd import (
    first_lane,
    load_bf16x8,
    load_f16x2,
    load_f32x8,
    load_i8,
    store_f32,
    store_f32x8,
)

_I = types.int64


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
