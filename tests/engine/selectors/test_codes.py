"""Rows in few bits: what is stored is what is read, and rounds as well as so few levels can."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.selectors import codes


def normal(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Rows of different sizes with columns as they are to be."""
    sizes = np.exp(random.uniform(-3, 3, (rows, 1))).astype(np.float32)
    return random.standard_normal((rows, columns), np.float32) * codes.spread(columns) * sizes


@pytest.mark.parametrize("columns", [64, 192, 448])
def test_where_integers_lie(columns: int, random: np.random.Generator) -> None:
    stored = random.integers(0, 256, (5, codes.row_bytes(columns)), np.uint8)
    found = codes.integers(stored)
    assert found.shape == (5, columns)
    for column in range(columns):
        if column < codes.FINE:
            expected = stored[:, column % 32] >> 4 * (column // 32) & 15
        else:
            block, inside = divmod(column - codes.FINE, 128)
            expected = stored[:, 32 + 32 * block + inside % 32] >> 2 * (inside // 32) & 3
        np.testing.assert_array_equal(found[:, column], expected)
    scales = random.random(5, np.float32)
    levels = found - np.where(np.arange(columns) < codes.FINE, 7.5, 1.5)
    np.testing.assert_allclose(codes.decode(stored, scales), levels * scales[:, None], rtol=1e-6)


@pytest.mark.parametrize("columns", [64, 192, 448])
def test_the_nearest_level_is_taken(columns: int, random: np.random.Generator) -> None:
    matrix = normal(random, 50, columns)
    stored, scales = codes.encode(matrix)
    assert stored.dtype == np.uint8
    assert scales.dtype == np.float32
    inside = np.abs(matrix) < codes.middle(columns) * scales[:, None]
    assert inside.mean() > 0.8
    assert (
        np.abs(codes.decode(stored, scales) - matrix)[inside]
        <= (0.501 * np.repeat(scales, columns))[inside.reshape(-1)]
    ).all()
    beyond = codes.integers(stored)[~inside]
    assert np.isin(beyond, (0, 3, 15)).all()


def test_rounding_is_as_good_as_levels_allow(random: np.random.Generator) -> None:
    """Max 1960: uniform levels lose 0.1188 of the variance with 4 of them, 0.01154 with 16."""
    matrix = normal(random, 400, 64 + 512)
    lost = np.square(codes.decode(*codes.encode(matrix)) - matrix)
    share = lost / np.square(matrix).mean(axis=1, keepdims=True) * np.square(codes.spread(576)).mean()
    assert share[:, codes.FINE :].mean() == pytest.approx(0.1188, rel=0.03)
    assert (share / np.square(codes.spread(576)))[:, : codes.FINE].mean() == pytest.approx(0.01154, rel=0.1)


def test_rows_of_zeros(random: np.random.Generator) -> None:
    matrix = normal(random, 3, 192)
    matrix[1] = 0
    found = codes.decode(*codes.encode(matrix))
    assert (found[1] == 0).all()
    assert np.isfinite(found).all()


def test_lengths_of_rows() -> None:
    assert [codes.most_columns(limit) for limit in (1, 64, 191, 192, 319, 576)] == [64, 64, 64, 192, 192, 576]
    for columns in (63, 65, 128, 256):
        with pytest.raises(ValueError, match=f"multiple of 128, not {columns}"):
            codes.encode(np.zeros((2, columns), np.float32))
