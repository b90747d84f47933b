"""Rows in few bits whose columns have been put in order: the first 64 in four bits, all others in two.

A row is scale * levels: the levels of the first columns are -7.5 to 7.5, of the others -1.5 to 1.5, in steps of 1. That
makes one scale for a whole row do, if columns have been scaled to what their levels are best for, `spread`. In bytes:
the integers 0 to 15 of columns 0 to 31 in the low halves of 32 bytes and those of the next 32 in the high halves; then
for each 128 columns the integers 0 to 3 of columns 32 k to 32 k + 31 in bits 2 k and 2 k + 1 of 32 bytes. The kernels
in `kernels/codes.py` read exactly this.
"""

from __future__ import annotations

import numpy as np

from fewfire.kernels.codes import FINE, FINE_MIDDLE, MIDDLE

_BLOCK = 128  # columns in two bits that share 32 bytes
_FITS = 3  # of scales and levels to each other, after which neither changes much
_STEP = np.float32(0.335)  # of 16 levels, in standard deviations, for normally distributed numbers (Max 1960)
_COARSE_STEP = np.float32(0.996)  # of 4 levels


def most_columns(limit: int) -> int:
    """The columns of the longest row with at most so many, or of the shortest one there is."""
    return FINE + max(0, limit - FINE) // _BLOCK * _BLOCK


def row_bytes(columns: int) -> int:
    """Bytes of a row without its scale."""
    return FINE // 2 + (columns - FINE) // 4


def spread(columns: int) -> np.ndarray:
    """The standard deviations that columns are to have, beside each other, float32 `(columns,)`."""
    return np.where(np.arange(columns) < FINE, _COARSE_STEP / _STEP, np.float32(1))


def middle(columns: int) -> np.ndarray:
    """What integers are above their levels, float32 `(columns,)`."""
    return np.where(np.arange(columns) < FINE, np.float32(FINE_MIDDLE), np.float32(MIDDLE))


def encode(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, uint8 `(rows, row_bytes)`, and scales, float32 `(rows,)`, of a float32 matrix `(rows, columns)`.

    Raises `ValueError` for a number of columns that rows do not have.
    """
    rows, columns = matrix.shape
    if columns != most_columns(columns):
        raise ValueError(f"rows have {FINE} columns and a multiple of {_BLOCK}, not {columns}")
    above = middle(columns)
    scale = np.sqrt((matrix * matrix).mean(axis=1, keepdims=True)) / np.sqrt((spread(columns) ** 2).mean())
    for _ in range(_FITS):
        levels = (_integers(matrix, scale, above) - above) * (matrix != 0)
        energy = np.maximum((levels * levels).sum(axis=1, keepdims=True), np.float32(0.25))
        scale = (levels * matrix).sum(axis=1, keepdims=True) / energy
    integers = _integers(matrix, scale, above).astype(np.uint8)
    fine, coarse = integers[:, :FINE].reshape(rows, 2, 32), integers[:, FINE:].reshape(rows, -1, 4, 32)
    shifted = coarse << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    pairs = np.bitwise_or.reduce(shifted, axis=2).reshape(rows, -1)
    return np.concatenate([fine[:, 0] | fine[:, 1] << 4, pairs], axis=1), scale[:, 0].astype(np.float32)


def integers(codes: np.ndarray) -> np.ndarray:
    """The integers of codes, uint8 `(rows, columns)`."""
    rows = len(codes)
    fine, coarse = codes[:, : FINE // 2], codes[:, FINE // 2 :].reshape(rows, -1, 1, 32)
    pairs = coarse >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return np.concatenate([fine & 15, fine >> 4, pairs.reshape(rows, -1)], axis=1)


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 matrix `(rows, columns)` that codes and scales stand for."""
    found = integers(codes)
    return (found - middle(found.shape[1])) * scales[:, None]


def _integers(matrix: np.ndarray, scale: np.ndarray, above: np.ndarray) -> np.ndarray:
    ratio = np.divide(matrix, scale, out=np.zeros_like(matrix), where=scale != 0)
    return np.clip(np.floor(ratio) + (above + np.float32(0.5)), 0, 2 * above)
