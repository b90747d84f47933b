"""Measures on activations small enough to be counted by hand."""

import numpy as np
import pytest

from fewfire.sparsity import (
    Ranks,
    aggregated,
    by_position,
    magnitudes,
    overlap,
    position_label,
    predictor_quality,
    random_union,
    small_share,
)


def mask(*rows: str) -> np.ndarray:
    """`x` is active."""
    return np.array([[c == "x" for c in row] for row in rows])


FIRED = np.array([[8.0, -0.07, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0], [-100.0, 1.0, -0.99, 10.0]], np.float32)


def test_small_is_of_each_tokens_own_largest():
    assert small_share(FIRED, 0.01) == pytest.approx(3 / 12)  # -0.07 and 0 under 0.08, -0.99 under 1


def test_magnitudes():
    edges = np.array([-2, -1.5, -0.5, 0])
    counted = 12 * magnitudes(FIRED, edges)  # ratios -2.06, -1.2 and 0; -2, -2.004, -1 and 0; zeros in no bin
    assert counted.tolist() == pytest.approx([3, 2, 2])


def test_how_many_hold_the_energy():
    energy = np.array([[1.0, 6.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    ranks = Ranks(energy)
    assert ranks.holders(0.5).tolist() == [1, 0, 2]
    assert ranks.holders(0.9).tolist() == [2, 0, 4]
    assert ranks.holders(1.0).tolist() == [3, 0, 4]
    assert ranks.holding(0.9).tolist() == mask(".x.x", "....", "xxxx").tolist()
    assert ranks.curve(4).tolist() == pytest.approx([0, 0.425, 0.7, 0.875, 1])  # without the token of no energy
    assert ranks.curve(2).tolist() == pytest.approx([0, 0.7, 1])
    assert Ranks(np.zeros((2, 3))).curve(2).tolist() == [0, 0, 0]


def test_masks_of_random_energies_hold_what_they_should():
    energy = np.random.default_rng(0).standard_normal((20, 64)) ** 2
    held = np.where(Ranks(energy).holding(0.9), energy, 0)
    share = held.sum(axis=1) / energy.sum(axis=1)
    least = np.where(held > 0, held, np.inf).min(axis=1) / energy.sum(axis=1)
    assert (share >= 0.9).all()
    assert (share - least < 0.9).all()  # not one too many


def test_overlap_is_of_neighbours_within_windows():
    active = mask("xx..", ".xx.", "....", "...x", "x...", "x.x.")
    found = overlap(active, [3, 3])  # pairs 0-1, 1-2, 3-4, 4-5
    assert found.kept == pytest.approx(2 / (2 + 0 + 1 + 2))
    assert found.jaccard == pytest.approx(2 / (3 + 2 + 2 + 2))
    assert overlap(mask("....", "...."), [2]) == (0, 0)
    assert overlap(active, [1] * 6) == (0, 0)


def test_overlap_by_chance():
    active = np.random.default_rng(0).random((400, 100)) < 0.2
    found = overlap(active, [400])
    assert found.kept == pytest.approx(0.2, abs=0.01)
    assert found.jaccard == pytest.approx(0.2 / 1.8, abs=0.01)


def test_aggregated_over_tokens_in_a_row():
    active = mask("x...", ".x..", "x...", "..x.", "xxxx", "....")
    found = aggregated(active, [5, 1])
    assert found == pytest.approx({1: 8 / 24, 2: 4 / 8, 4: 3 / 4})  # the fifth token fits into no pair


def test_aggregated_by_chance():
    active = np.random.default_rng(0).random((512, 200)) < 0.1
    for t, share in aggregated(active, [256, 256]).items():
        assert share == pytest.approx(random_union(0.1, t), abs=0.02)
    assert random_union(0.1, 2) == pytest.approx(0.19)


def test_by_position():
    active = mask("xxxx", "x...", "xx..", "....", "..xx")
    assert by_position(active, [3, 2]) == pytest.approx({"0": 0.5, "1-7": (0.25 + 0.5 + 0.5) / 3})
    long = by_position(np.ones((40, 1), bool), [40])
    assert list(long) == ["0", "1-7", "8-31", "32-127"]
    assert position_label(4) == "128-511"


def test_quality_of_a_predictor():
    exact, predicted = mask("xx..", "x..."), mask("x.xx", "x...")
    assert predictor_quality(exact, predicted) == pytest.approx((2 / 3, 2 / 4, 4 / 8))
    nothing = mask("....", "....")
    assert predictor_quality(nothing, predicted) == (1, 0, 0.5)
    assert predictor_quality(exact, nothing) == (0, 1, 0)
