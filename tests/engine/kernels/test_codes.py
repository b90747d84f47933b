"""Coded rows against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from perf.kernel_table import TABLE


@pytest.mark.parametrize("columns", [64, 192, 320, 448, 4160])
def test_dot_codes(columns: int, random: np.random.Generator) -> None:
    for rows in (1, 2, 3, 4, 5, 6, 7, 30, 129):
        TABLE["dot_codes"](random, rows=rows, columns=columns).check()
