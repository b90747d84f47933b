"""Attention of one head and the cache's cells against their twins in `perf/kernel_table.py`."""

from __future__ import annotations

import numpy as np
import pytest

from perf.kernel_table import TABLE

CACHES = ("f32", "f16")


@pytest.mark.parametrize("head_dim", [1, 6, 8, 20, 64, 100, 256])
@pytest.mark.parametrize("cache", CACHES)
def test_attend(cache: str, head_dim: int, random: np.random.Generator) -> None:
    """One position, a few, many; from the beginning and through a window."""
    for count in (1, 2, 3, 4, 5, 7, 8, 31, 300):
        for start in (0, int(random.integers(1, 50))):
            TABLE[f"attend_{cache}"](random, start=start, stop=start + count, head_dim=head_dim).check()


@pytest.mark.parametrize("width", [8, 64, 104])
@pytest.mark.parametrize("cache", CACHES)
def test_remember(cache: str, width: int, random: np.random.Generator) -> None:
    TABLE[f"remember_{cache}"](random, width=width).check()
