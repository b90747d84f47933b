"""Dot products and scaled sums of listed rows against their twins in `perf/kernel_table.py`."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire import quantize
from fewfire.buffers import axpy_scratch
from fewfire.kernels import axpy
from fewfire.kernels.axpy import BLOCK
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


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_sums_of_integers_stay_within_16_bits(weights: str) -> None:
    """Rows of the largest integers, and factors that all have the largest coefficient."""
    rows = quantize.encode(np.full((BLOCK, 64), 1, np.float32), weights, "axpy")
    integers = {"q4": 0xFF, "q8": 127}[weights]
    rows.view(np.uint8)[:, : 64 if weights == "q8" else 32] = integers
    values = quantize.decode(rows, weights, "axpy", 64).astype(np.float64)
    listed = np.arange(BLOCK, dtype=np.int32)
    for sign in (1, -1):
        factors, y = np.full(BLOCK, sign * 0.37, np.float32), np.zeros(64, np.float32)
        scratch = np.zeros(axpy_scratch(64), np.float32)
        lists = (listed.ctypes.data, listed.ctypes.data, BLOCK)
        arguments = (*lists, factors.ctypes.data, y.ctypes.data, 64, scratch.ctypes.data)
        getattr(axpy, f"gather_axpy_{weights}")(rows.ctypes.data, rows.strides[0], *arguments)
        np.testing.assert_allclose(y, factors @ values, rtol=1e-5)


@pytest.mark.parametrize("weights", FORMATS)
def test_what_is_not_finite_is_not_hidden(weights: str, random: np.random.Generator) -> None:
    for bad in (np.nan, np.inf):
        for place in range(BLOCK):
            case = TABLE[f"gather_axpy_{weights}"](
                random, rows=BLOCK, columns=64, chosen=np.arange(BLOCK), bad=(place, bad)
            )
            case.run()
            assert not np.isfinite(case.results()[0]).any()
