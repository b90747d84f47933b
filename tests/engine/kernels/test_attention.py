"""Attention over a range of one cached head, putting ranges together, and the cache's cells against their twins."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.kernels import attention
from fewfire.kernels.attention import EVERYTHING, RANGE, SCORES
from perf.kernel_table import TABLE

CACHES = ("f32", "f16")


@pytest.mark.parametrize("head_dim", [1, 6, 8, 20, 24, 32, 64, 100, 256])
@pytest.mark.parametrize("queries", [1, 2, 3, 4])
@pytest.mark.parametrize("cache", CACHES)
def test_attend(cache: str, queries: int, head_dim: int, random: np.random.Generator) -> None:
    """One position, a few, many; from the beginning and from anywhere."""
    for count in (1, 2, 3, 4, 5, 7, 8, 31, RANGE - 1, RANGE):
        for start in (0, int(random.integers(1, 50))):
            case = TABLE[f"attend_{cache}_{queries}"](random, start=start, stop=start + count, head_dim=head_dim)
            case.check()


@pytest.mark.parametrize("cache", CACHES)
def test_what_each_token_sees(cache: str, random: np.random.Generator) -> None:
    """Four tokens' queries: the first ones see less at the end, the last ones less at the beginning."""
    for count in (1, 2, 3, 4, 5, 9, 64):
        for last in range(-4, 3):
            for window in (1, 2, 3, count - last, count + 1, EVERYTHING):
                seen = {"start": 7, "stop": 7 + count, "last": 7 + count + last, "window": max(1, window)}
                TABLE[f"attend_{cache}_4"](random, head_dim=20, **seen).check()


@pytest.mark.parametrize("width", [8, 64, 104])
def test_merge(width: int, random: np.random.Generator) -> None:
    for _ in range(20):
        TABLE["merge"](random, width=width).check()


@pytest.mark.parametrize("head_dim", [1, 6, 8, 20, 64, 100, 256])
def test_settle(head_dim: int, random: np.random.Generator) -> None:
    TABLE["settle"](random, head_dim=head_dim).check()


@pytest.mark.parametrize("bad", ["query", "keys", "values"])
@pytest.mark.parametrize("queries", [1, 2, 3, 4])
def test_what_is_not_a_number_stays_so(queries: int, bad: str) -> None:
    """Of the query alone; a position of all who see it."""
    width, count = 16, 11
    keys, values, query = (np.ones((n, width), np.float32) for n in (count, count, queries))
    {"query": query, "keys": keys, "values": values}[bad][-1, 3] = np.nan
    out, scores = np.zeros((queries, width + 8), np.float32), np.zeros(SCORES, np.float32)
    getattr(attention, f"attend_f32_{queries}")(
        keys.ctypes.data, values.ctypes.data, 0, count, count, EVERYTHING, query.ctypes.data, 4 * width, 0.1,
        scores.ctypes.data, out.ctypes.data, out.strides[0], width,
    )  # fmt: skip
    found = np.isnan(out[:, 3])
    assert found[-1]
    assert found.all() == (bad != "query" or queries == 1)


@pytest.mark.parametrize("width", [8, 64, 104])
@pytest.mark.parametrize("cache", CACHES)
def test_remember(cache: str, width: int, random: np.random.Generator) -> None:
    TABLE[f"remember_{cache}"](random, width=width).check()
