"""Deltas in few bits: what comes back is near, and is the nearest that six levels allow."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire import deltas


@pytest.mark.parametrize("weights", [1, 3, 7, 64, 65])
def test_what_comes_back(weights: int) -> None:
    lines = np.random.default_rng(weights).standard_normal((40, weights)).astype(np.float32)
    lines *= np.float32(10.0) ** np.arange(-20, 20)[:, None] / 100
    lines[3] = 0
    packed, scales = deltas.encode(lines)
    assert (packed.shape, packed.dtype, scales.shape) == ((40, -(-weights // 3)), np.uint8, (40,))
    back = deltas.decode(packed, scales, weights)
    assert not back[3].any()
    off = np.abs(back - lines)
    inside = np.abs(lines) <= 3 * scales[:, None]
    assert (off[inside] <= (0.501 * scales[:, None] * np.ones_like(lines))[inside]).all()
    levels = scales[:, None, None] * (np.arange(6, dtype=np.float32) - 2.5)
    nearest = np.abs(lines[:, :, None] - levels).min(axis=2)
    assert (np.abs(off - nearest) <= 1e-5 * np.abs(lines)).all()


def test_little_is_lost_of_a_normal_distribution() -> None:
    lines = np.random.default_rng(0).standard_normal((30, 600)).astype(np.float32)
    back = deltas.decode(*deltas.encode(lines), 600)
    assert (
        np.square(back - lines).mean() < 0.062
    )  # Max (1960): 0.058 with six equally spaced levels, of all lines at once


def test_a_byte_that_stands_for_nothing() -> None:
    with pytest.raises(ValueError, match="a byte is 216"):
        deltas.decode(np.array([[215, 216]], np.uint8), np.ones(1, np.float32), 6)
