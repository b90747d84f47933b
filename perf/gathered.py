"""The gathered read: how fast listed rows are read when nothing is done with them and nothing is asked for ahead.

One word of every cache line of the rows is loaded and added up. A
core keeps only so many lines under way, so rows of one to five kilobytes from anywhere in memory, where the hardware
begins anew with each, come slower than a stream. Of two ways the faster counts, as for streaming reads: one row after
the other, and four from four places of the list side by side. A kernel may still be faster, by asking ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np

from fewfire.kernels.simd import load_i32, load_i64

_OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False}


@numba.njit(**_OPTIONS)
def _row(start, size):
    total = 0
    for line in range(start // 64 * 64, start + size, 64):
        total += load_i64(line)
    return total


@numba.njit(**_OPTIONS)
def in_order(matrix, stride, size, lists):
    """One row after the other; `lists`: int64 (lists, 2), the address of each one's int32 and how many."""
    total = 0
    for i in range(len(lists)):
        for j in range(lists[i, 1]):
            total += _row(matrix + stride * load_i32(lists[i, 0] + 4 * j), size)
    return total


@numba.njit(**_OPTIONS)
def side_by_side(matrix, stride, size, lists):
    """Rows of the list's four quarters together, line by line, with the last word of each, wherever it lies."""
    total = 0
    for i in range(len(lists)):
        rows, quarter = lists[i, 0], lists[i, 1] // 4
        for j in range(quarter):
            a = matrix + stride * load_i32(rows + 4 * j)
            b = matrix + stride * load_i32(rows + 4 * (quarter + j))
            c = matrix + stride * load_i32(rows + 4 * (2 * quarter + j))
            d = matrix + stride * load_i32(rows + 4 * (3 * quarter + j))
            for line in range(0, size - 7, 64):
                total += load_i64(a + line) + load_i64(b + line) + load_i64(c + line) + load_i64(d + line)
            total += load_i64(a + size - 8) + load_i64(b + size - 8) + load_i64(c + size - 8) + load_i64(d + size - 8)
        for j in range(4 * quarter, lists[i, 1]):
            total += _row(matrix + stride * load_i32(rows + 4 * j), size)
    return total


WAYS: tuple[Callable[..., int], ...] = (in_order, side_by_side)


def described(lists: Sequence[np.ndarray]) -> Any:
    """Lists of int32 as these functions take them."""
    return np.array([(one.ctypes.data, one.size) for one in lists], np.int64).reshape(-1, 2)
