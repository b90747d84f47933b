"""Medians, and ratios pair by pair."""

from __future__ import annotations

from perf.spread import pairwise, shown, spread


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_a_slow_round_cancels_out_of_a_ratio():
    assert pairwise([10.0, 1.0, 20.0], [5.0, 0.5, 10.0]) == {"median": 2.0, "min": 2.0, "max": 2.0}


def test_shown():
    assert shown(spread([1.0, 2.0, 4.0])) == "2.0 (1.0..4.0)"
    assert shown(None) == "-"
