"""Matrix products for batches of tokens against their twins in `perf/kernel_table.py`."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.quantize import FORMATS, padded
from perf.kernel_table import TABLE


@pytest.mark.parametrize("columns", [40, 64, 100, 192, 320, 448, 576, 1536])
@pytest.mark.parametrize("weights", FORMATS)
def test_dot_tokens(weights: str, columns: int, random: np.random.Generator) -> None:
    for tokens in (4, 8, 20):
        rows = int(random.integers(1, 38))
        TABLE[f"dot_tokens_{weights}"](random, rows=rows, columns=columns, tokens=tokens).check()


@pytest.mark.parametrize("columns", [40, 64, 100, 320])
@pytest.mark.parametrize("weights", FORMATS)
def test_down_strip(weights: str, columns: int, random: np.random.Generator) -> None:
    """Each strip, with fewer neurons than are decoded at a time, as many, and more."""
    for neurons in (1, 37, 64, 150):
        for strip in range(padded(columns) // 64):
            tokens = 4 * int(random.integers(1, 4))
            case = TABLE[f"down_strip_{weights}"](random, neurons=neurons, columns=columns, strip=strip, tokens=tokens)
            case.check()
