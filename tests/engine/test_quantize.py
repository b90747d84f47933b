"""The number formats: what survives encoding and decoding, how far the rest is off, and that rows have their size."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.quantize import (
    FORMATS,
    GROUP,
    LARGEST,
    check_format,
    decode,
    dot_order,
    encode,
    padded,
    row_bytes,
)

COLUMNS = (1, 40, 64, 100, 192, 320, 576, 1536)
LAYOUTS = ("dot", "axpy")
STEPS = {"q8": 254, "q4": 15}  # from a group's smallest to its largest weight


def matrix(rows: int, columns: int) -> np.ndarray:
    random = np.random.default_rng()
    scales = np.exp(random.uniform(-5, 2, (rows, 1)))
    return (random.standard_normal((rows, columns)) * scales).astype(np.float32)


def groups(values: np.ndarray) -> np.ndarray:
    """(rows, groups, GROUP), padded with zeros as the rows are."""
    wide = np.zeros((len(values), padded(values.shape[1])), np.float64)
    wide[:, : values.shape[1]] = values
    return wide.reshape(len(values), -1, GROUP)


def round_trip(values: np.ndarray, weights: str, layout: str) -> np.ndarray:
    return decode(encode(values, weights, layout), weights, layout, values.shape[1])


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", FORMATS)
def test_round_trip(weights: str, layout: str, columns: int) -> None:
    values = matrix(9, columns)
    stored = encode(values, weights, layout)
    assert stored.shape == (9, row_bytes(weights, columns))
    assert stored.dtype == np.uint8
    assert stored.flags.c_contiguous
    found = decode(stored, weights, layout, columns)
    assert found.dtype == np.float32
    assert found.shape == values.shape
    assert found.flags.c_contiguous
    error = np.abs(groups(found) - groups(values))
    if weights == "f32":
        assert not error.any()
    elif weights == "bf16":
        assert (error <= np.abs(groups(values)) * 2.0**-8).all()
    else:
        span = np.abs(groups(values)).max(axis=2) * 2
        rounding = span * 2.0**-11 + 127 * 2.0**-25  # of a float16 scale, perhaps a subnormal one
        # Half a step, or a whole one where the ends of the range are cut off.
        assert (error.max(axis=2) <= span / STEPS[weights] * 1.01 + rounding).all()
        assert (np.sqrt((error**2).mean(axis=2)) <= span / STEPS[weights] * 0.5 + rounding).all()


@pytest.mark.parametrize("weights", FORMATS)
def test_both_layouts_hold_the_same_weights(weights: str) -> None:
    values = matrix(5, 320)
    np.testing.assert_array_equal(round_trip(values, weights, "dot"), round_trip(values, weights, "axpy"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", FORMATS)
def test_every_weight_has_its_own_place(weights: str, layout: str) -> None:
    """Each stored integer changes one column and no other, so none is stored twice or lost."""
    values = np.zeros((320, 320), np.float32)
    np.fill_diagonal(values, 1.0)
    np.testing.assert_allclose(round_trip(values, weights, layout), values, rtol=0, atol=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", FORMATS)
def test_special_rows(weights: str, layout: str) -> None:
    """Zeros stay zero, the tiniest weights stay finite, and the largest that a format takes are not infinite."""
    limit = LARGEST.get(weights, 3e38)
    values = np.zeros((4, 100), np.float32)
    values[1] = 1e-30
    values[2, ::2], values[2, 1::2] = limit, -limit
    values[3, 7] = -limit
    found = round_trip(values, weights, layout)
    assert np.isfinite(found).all()
    assert not found[0].any()
    assert np.abs(found[1]).max() < 1e-7
    np.testing.assert_allclose(found[2:], values[2:], rtol=0.01, atol=limit / 15 if weights == "q4" else 0)


def test_bf16_rounds_to_nearest_even() -> None:
    ties = (np.arange(0x3F80, 0x3FC0, dtype=np.uint32) << 16 | 0x8000).view(np.float32)[None]
    stored = encode(ties, "bf16", "dot").view(np.uint16)[0, : ties.size]
    assert (stored % 2 == 0).all()
    near = (np.arange(0x3F80, 0x3FC0, dtype=np.uint32) << 16 | 0x8001).view(np.float32)[None]
    np.testing.assert_array_equal(
        encode(near, "bf16", "dot").view(np.uint16)[0, : near.size], np.arange(0x3F81, 0x3FC1)
    )


@pytest.mark.parametrize("columns", COLUMNS)
def test_dot_order_is_a_permutation_that_keeps_groups_in_lanes(columns: int) -> None:
    order = dot_order(columns)
    np.testing.assert_array_equal(np.sort(order), np.arange(padded(columns)))
    start = 0
    while start < order.size:
        block = next(size for size in (8, 4, 2) if size * GROUP <= order.size - start)
        lanes = order[start : start + block * GROUP].reshape(block, 8, 4)  # register, lane, byte
        assert (lanes // GROUP == lanes[:1, :, :1] // GROUP).all(), "a lane sums one group only"
        start += block * GROUP


def test_what_is_lost_is_small_on_average() -> None:
    """Of normal weights, as trained ones nearly are: share of their energy."""
    values = np.random.default_rng().standard_normal((64, 1024)).astype(np.float32)
    lost = {w: float(((round_trip(values, w, "dot") - values) ** 2).mean()) for w in FORMATS}
    assert lost["f32"] == 0
    assert lost["bf16"] < 5e-6
    assert lost["q8"] < 6e-5
    assert lost["q4"] < 8e-3


def test_unknown_format() -> None:
    for weights in FORMATS:
        check_format(weights)
    with pytest.raises(ValueError, match=r"'q5'.*q4, q8, bf16, f32"):
        check_format("q5")
