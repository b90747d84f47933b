"""How a row of weights is stored: the formats f32, bf16, q8 and q4, encoded and decoded in plain NumPy.

Every format pads a row with zeros to a multiple of 64 columns. The integer formats hold one signed integer per weight
and one float16 scale per group of 32 neighbouring columns: weight = scale * integer, -127..127 for q8, -8..7 for q4.

A row is laid out for one of two uses (`Layout`). "axpy" rows (down) keep their columns in order, q4 as eight nibbles
per 32-bit word: nibble n of word l in a run of 64 columns is column 8 n + l, in two's complement. "dot" rows (all
others) interleave the groups of a block of eight (then four, two) four columns at a time, so that 32-bit lane l of a
register adds up one group only; q4 puts registers 2m and 2m + 1 into the low and high nibbles of 32 bytes, as
integer + 8.
The kernels in `kernels/gather.py` read exactly this.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

Layout = Literal["dot", "axpy"]
GROUP = 32
FORMATS = ("q4", "q8", "bf16", "f32")
LARGEST = {"q8": 65504.0 * 127, "q4": 65504.0 * 7}  # what the float16 scales can express
_DTYPES = {"f32": np.float32, "bf16": np.uint16, "q8": np.int8, "q4": np.uint8}


def check_format(weights: str) -> None:
    """Raises `ValueError` unless `weights` names a format."""
    if weights not in FORMATS:
        raise ValueError(f"unknown weight format {weights!r}: choose one of {', '.join(FORMATS)}")


def dtype(weights: str) -> np.dtype:
    """The element type of a packed matrix; it is what tells the kernels the format."""
    return np.dtype(_DTYPES[weights])


def padded(columns: int) -> int:
    """Columns rounded up to what a row stores."""
    return -(-columns // 64) * 64


def row_elements(weights: str, columns: int) -> int:
    """Elements (of `dtype`) of one stored row."""
    n = padded(columns)
    return {"f32": n, "bf16": n, "q8": n + n // 16, "q4": n // 2 + n // 16}[weights]


@cache
def dot_order(columns: int) -> np.ndarray:
    """The column that each stored integer of a dot row belongs to, `(padded(columns),)` int64."""
    order, start, groups = [], 0, padded(columns) // GROUP
    while groups:
        block = next(size for size in (8, 4, 2) if size <= groups)
        columns_of = np.arange(block * GROUP).reshape(8, block, 4)  # lane, register, byte
        order.append(start + columns_of.transpose(1, 0, 2).reshape(-1))
        start, groups = start + block * GROUP, groups - block
    return np.concatenate(order)


def encode(matrix: np.ndarray, weights: str, layout: Layout) -> np.ndarray:
    """Stores each row of a float32 matrix `(rows, columns)`: `(rows, row_elements)` of the format's dtype."""
    rows, columns = matrix.shape
    values = np.zeros((rows, padded(columns)), np.float32)
    values[:, :columns] = matrix
    if weights == "f32":
        return values
    if weights == "bf16":
        bits = values.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)  # nearest even
    groups = values.reshape(rows, -1, GROUP)
    scales, integers = (_q8 if weights == "q8" else _q4)(groups)
    stored = integers.reshape(rows, -1)
    if layout == "dot":
        stored = stored[:, dot_order(columns)]
    if weights == "q4":
        stored = _pack_nibbles(stored, layout)
    out = np.concatenate([stored.view(np.uint8), scales.view(np.uint8)], axis=1)
    return out.view(dtype(weights))


def decode(stored: np.ndarray, weights: str, layout: Layout, columns: int) -> np.ndarray:
    """The float32 matrix `(rows, columns)` that stored rows stand for."""
    rows, n = len(stored), padded(columns)
    if weights == "f32":
        return np.ascontiguousarray(stored[:, :columns])
    if weights == "bf16":
        return np.ascontiguousarray((stored.astype(np.uint32) << 16).view(np.float32)[:, :columns])
    quant_bytes = n if weights == "q8" else n // 2
    raw = np.ascontiguousarray(stored).view(np.uint8)
    integers = raw[:, :quant_bytes].view(np.int8)
    if weights == "q4":
        integers = _unpack_nibbles(raw[:, :quant_bytes], layout)
    if layout == "dot":
        ordered = np.empty((rows, n), np.int8)
        ordered[:, dot_order(columns)] = integers
        integers = ordered
    scales = np.ascontiguousarray(raw[:, quant_bytes:]).view(np.float16).astype(np.float32)
    values = integers.reshape(rows, -1, GROUP) * scales[:, :, None]
    return np.ascontiguousarray(values.reshape(rows, n)[:, :columns])


def _divide(groups: np.ndarray, scales: np.ndarray) -> np.ndarray:
    wide = scales.astype(np.float32)[:, :, None]
    return np.divide(groups, wide, out=np.zeros_like(groups), where=wide != 0)


def _q8(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = (np.abs(groups).max(axis=2) / 127).astype(np.float16)
    return scales, np.clip(np.rint(_divide(groups, scales)), -127, 127).astype(np.int8)


def _q4(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
    scales = (extreme / -8).astype(np.float16)
    return scales, np.clip(np.rint(_divide(groups, scales)), -8, 7).astype(np.int8)


def _pack_nibbles(integers: np.ndarray, layout: Layout) -> np.ndarray:
    rows = len(integers)
    if layout == "dot":
        pairs = (integers + 8).astype(np.uint8).reshape(rows, -1, 2, 32)
        return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(rows, -1)
    nibbles = (integers.view(np.uint8) & 15).astype(np.uint32).reshape(rows, -1, 8, 8)  # run, nibble, word
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    words = np.bitwise_or.reduce(nibbles << shifts, axis=2).astype("<u4")
    return words.reshape(rows, -1).view(np.uint8)


def _unpack_nibbles(packed: np.ndarray, layout: Layout) -> np.ndarray:
    rows = len(packed)
    if layout == "dot":
        pairs = packed.reshape(rows, -1, 1, 32)
        both = np.concatenate([pairs & 15, pairs >> 4], axis=2)
        return (both.astype(np.int8) - 8).reshape(rows, -1)
    words = np.ascontiguousarray(packed).view("<u4").reshape(rows, -1, 1, 8)
    nibbles = (words >> np.arange(0, 32, 4, dtype=np.uint32)[:, None]) & 15
    return ((nibbles ^ 8).astype(np.int8) - 8).reshape(rows, -1)
