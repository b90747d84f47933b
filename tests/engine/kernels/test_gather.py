"""Dot products and scaled sums of listed rows against their twins in `perf/kernel_table.py`."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.quantize import FORMATS
from perf.kernel_table import TABLE

COLUMNS = (1, 40, 64, 100, 192, 256, 320, 448, 576, 1536)
KINDS = ("empty", "one", "few", "repeated", "sorted", "full", "permuted")


def chosen(random: np.random.Generator, kind: str, rows: int) -> np.ndarray:
    """A list of rows, as a selector might give it and as none would."""
    return {
        "empty": list,
        "one": lambda: [rows - 1],
        "few": lambda: random.integers(rows, size=random.integers(2, 8)),
        "repeated": lambda: np.repeat(random.integers(rows), 9),
        "sorted": lambda: np.flatnonzero(random.random(rows) < 0.3),
        "full": lambda: np.arange(rows),
        "permuted": lambda: random.permutation(rows),
    }[kind]()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kernel", ["gather_dot", "gather_axpy"])
def test_any_list_of_rows(kernel: str, weights: str, columns: int, random: np.random.Generator) -> None:
    for kind in KINDS:
        rows = int(random.integers(1, 38))
        case = TABLE[f"{kernel}_{weights}"](random, rows=rows, columns=columns, chosen=chosen(random, kind, rows))
        case.check()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("weights", FORMATS)
def test_read_row(weights: str, columns: int, random: np.random.Generator) -> None:
    """Exactly what is stored, the padding too."""
    for row in range(3):
        TABLE[f"read_row_{weights}"](random, rows=3, columns=columns, row=row).check()
