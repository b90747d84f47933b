"""Deltas in few bits: what comes back is near, small, and refused where it is damaged."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from fewfire import deltas


@pytest.mark.parametrize("weights", [1, 3, 7, 64, 65])
def test_what_comes_back(weights: int) -> None:
    lines = np.random.default_rng(weights).standard_normal((40, weights)).astype(np.float32)
    lines *= np.float32(10.0) ** np.arange(-20, 20)[:, None] / 100
    lines[3] = 0
    packed, steps = deltas.encode(lines)
    assert (packed.ndim, packed.dtype, steps.shape, steps.dtype) == (1, np.uint8, (40,), np.float32)
    back = deltas.decode(packed, steps, weights)
    assert back.shape == lines.shape
    assert back.dtype == np.float32
    assert not back[3].any()
    assert (np.abs(back - lines) <= 0.5001 * steps[:, None]).all()


def test_a_weight_far_outside_is_cut() -> None:
    lines = np.zeros((1, 100_000), np.float32)
    lines[0, 7] = 1.0
    assert deltas.decode(*deltas.encode(lines), 100_000)[0, 7] == pytest.approx(127 * 0.7 / 100_000**0.5)


def test_little_is_lost_of_a_normal_distribution() -> None:
    lines = np.random.default_rng(0).standard_normal((300, 600)).astype(np.float32)
    lines *= np.geomspace(1e-3, 10, 300, dtype=np.float32)[:, None]
    packed, steps = deltas.encode(lines)
    error = np.square(deltas.decode(packed, steps, 600) - lines).sum(axis=1) / np.square(lines).sum(axis=1)
    assert error.mean() < 0.043  # a step of 0.7 by itself: 0.7^2 / 12 = 0.041
    assert 8 * packed.size / lines.size < 2.65


def test_damaged_bytes() -> None:
    packed, steps = deltas.encode(np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32))
    for damaged in (
        packed[:-1],
        packed[: len(packed) // 2],
        packed[:0],
        np.append(packed, np.uint8(0)),
        np.zeros(40, np.uint8),
        np.frombuffer(zlib.compress(bytes(100_000_000)), np.uint8),
        np.frombuffer(zlib.compress(bytes(5 * 64 - 1)), np.uint8),
        np.frombuffer(zlib.compress(bytes(5 * 64 + 1)), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"codes|Error"):
            deltas.decode(damaged, steps, 64)
