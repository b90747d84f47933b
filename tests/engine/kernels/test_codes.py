"""Coded rows against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.kernels.codes import dot_codes
from perf.kernel_table import TABLE


@pytest.mark.parametrize("columns", [64, 192, 320, 448, 4032])
def test_dot_codes(columns: int, random: np.random.Generator) -> None:
    for rows in (1, 2, 3, 4, 5, 6, 7, 30, 129):
        TABLE["dot_codes"](random, rows=rows, columns=columns).check()


def test_the_largest_integers_fit(random: np.random.Generator) -> None:
    """At every level: sums of sixteen bits would overflow."""
    codes, out = np.full((5, 32 + 4096 // 4), 0xFF, np.uint8), np.empty(5, np.float32)
    for value in (127, -127):
        x = np.full(64 + 4096, value, np.int8)
        dot_codes(codes.ctypes.data, codes.shape[1], 5, x.ctypes.data, out.ctypes.data)
        assert (out == value * (64 * 15 + 4096 * 3)).all()
