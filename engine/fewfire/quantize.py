"""How a row of weights is stored: the formats f32, bf16, q8 and q4, encoded and decoded in plain NumPy.

Every format pads a row with zeros to a multiple of 64 columns. The integer formats work in groups of 32 neighbouring
columns. q8 holds an integer from -127 to 127 per weight and a float16 scale per group: weight = scale * integer. q4
holds 0 to 15, a float16 scale and a float16 minimum: weight = scale * integer + minimum. A row has first its integers,
then its groups' scales, then their minima.

A row is laid out for one of two uses (`Layout`). "axpy" rows (down) keep their columns in order. "dot" rows (all
others) interleave the groups of a block of eight (then four, two) four columns at a time, so that 32-bit lane l of a
register adds up one group only. q4 puts integers 64 n to 64 n + 31 of either order into the low nibbles of 32 bytes,
and the next 32 into the high ones. The kernels in `kernels/gather.py` and `kernels/axpy.py` read exactly this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np

Layout = Literal["dot", "axpy"]
Fit = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
GROUP = 32
FORMATS = ("q4", "q8", "bf16", "f32")
LARGEST = {"q8": 65504.0 * 127, "q4": 65504.0}  # what float16 scales and minima can express


def check_format(weights: str) -> None:
    """Raises `ValueError` unless `weights` names a format."""
    if weights not in FORMATS:
        raise ValueError(f"unknown weight format {weights!r}: choose one of {', '.join(FORMATS)}")


def padded(columns: int) -> int:
    """Columns rounded up to what a row stores."""
    return -(-columns // 64) * 64


def row_bytes(weights: str, columns: int) -> int:
    """Bytes of one stored row."""
    n = padded(columns)
    return {"f32": 4 * n, "bf16": 2 * n, "q8": n + n // 16, "q4": n // 2 + n // 8}[weights]


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


def encode(matrix: np.ndarray, weights: str, layout: Layout, fit: Fit | None = None) -> np.ndarray:
    """Stores each row of a float32 matrix `(rows, columns)`: bytes `(rows, row_bytes)`.

    `fit` replaces `fit_q4`, which is slow (a gigabyte takes minutes).
    """
    rows, columns = matrix.shape
    values = np.zeros((rows, padded(columns)), np.float32)
    values[:, :columns] = matrix
    if weights == "f32":
        return values.view(np.uint8)
    if weights == "bf16":
        bits = values.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16).view(np.uint8)  # nearest even
    groups = values.reshape(rows, -1, GROUP)
    integers, *parameters = (_q8 if weights == "q8" else fit or fit_q4)(groups)
    stored = integers.reshape(rows, -1)
    if layout == "dot":
        stored = stored[:, dot_order(columns)]
    if weights == "q4":
        stored = _pack_nibbles(stored)
    return np.concatenate([stored.view(np.uint8), *(p.view(np.uint8) for p in parameters)], axis=1)


def decode(stored: np.ndarray, weights: str, layout: Layout, columns: int) -> np.ndarray:
    """The float32 matrix `(rows, columns)` that the bytes of stored rows stand for."""
    rows, n, raw = len(stored), padded(columns), np.ascontiguousarray(stored)
    if weights == "f32":
        return np.ascontiguousarray(raw.view(np.float32)[:, :columns])
    if weights == "bf16":
        bits = raw.view(np.uint16).astype(np.uint32) << 16
        return np.ascontiguousarray(bits.view(np.float32)[:, :columns])
    quant_bytes = n if weights == "q8" else n // 2
    integers = raw[:, :quant_bytes].view(np.int8)
    if weights == "q4":
        integers = _unpack_nibbles(raw[:, :quant_bytes])
    if layout == "dot":
        ordered = np.empty((rows, n), np.int8)
        ordered[:, dot_order(columns)] = integers
        integers = ordered
    parameters = np.ascontiguousarray(raw[:, quant_bytes:]).view(np.float16).astype(np.float32)
    scales, minima = parameters[:, : n // GROUP, None], parameters[:, n // GROUP :, None]
    values = integers.reshape(rows, -1, GROUP) * scales
    if weights == "q4":
        values += minima
    return np.ascontiguousarray(values.reshape(rows, n)[:, :columns])


def _q8(groups: np.ndarray) -> tuple[np.ndarray, ...]:
    scales = (np.abs(groups).max(axis=2) / 127).astype(np.float16)
    wide = scales.astype(np.float32)[:, :, None]
    integers = np.divide(groups, wide, out=np.zeros_like(groups), where=wide != 0)
    return np.clip(np.rint(integers), -127, 127).astype(np.int8), scales


# Shares of a group's range that the 16 levels may span: a narrower range rounds the middle more finely and clips
# the ends. The best share differs from group to group (perf/LOG.md, "q4: scale and minimum").
SPANS = np.linspace(0.75, 1.05, 13, dtype=np.float32)


def fit_q4(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, scales and minima of groups `(rows, groups, 32)` float32.

    Takes the span with the least squared error, after scale and minimum have been fitted to its integers.
    """
    low, high = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    best = np.full(low.shape, np.inf, np.float32)
    integers = np.zeros(groups.shape, np.int8)
    scales, minima = np.zeros(low.shape, np.float16), np.zeros(low.shape, np.float16)
    mean = groups.mean(axis=2, keepdims=True)
    for span in SPANS:
        step = np.maximum((high - low) * span / 15, np.float32(1e-12))
        start = (low + high) / 2 - step * 7.5
        levels = np.clip(np.rint((groups - start) / step), 0, 15)
        centred = levels - levels.mean(axis=2, keepdims=True)
        spread = (centred * centred).sum(axis=2, keepdims=True)
        slope = (centred * (groups - mean)).sum(axis=2, keepdims=True) / np.maximum(spread, np.float32(1e-12))
        scale = slope.astype(np.float16)
        minimum = np.clip(mean - scale * levels.mean(axis=2, keepdims=True), -65504, 65504).astype(np.float16)
        error = ((groups - scale * levels - minimum) ** 2).sum(axis=2, keepdims=True)
        better = error < best
        np.copyto(best, error, where=better)
        np.copyto(integers, levels.astype(np.int8), where=better)
        np.copyto(scales, scale, where=better)
        np.copyto(minima, minimum, where=better)
    return integers, scales[:, :, 0], minima[:, :, 0]


def _pack_nibbles(integers: np.ndarray) -> np.ndarray:
    rows, pairs = len(integers), integers.astype(np.uint8).reshape(len(integers), -1, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(rows, -1)


def _unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    rows, bytes_ = len(packed), packed.reshape(len(packed), -1, 1, 32)
    return np.concatenate([bytes_ & 15, bytes_ >> 4], axis=2).astype(np.int8).reshape(rows, -1)
