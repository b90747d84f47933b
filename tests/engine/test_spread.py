"""Spreading: no other settings do less damage for the bytes, and limits are kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fewfire.spread import Choice, cheapest, total_cost, total_damage, within_cost, within_damage


def curves(parts: int, settings: int = 6, seed: int = 0) -> list[Choice]:
    """Parts whose damage falls convexly with what they read, some a thousand times as steeply as others."""
    random = np.random.default_rng(seed)
    densities = np.linspace(1, 0.1, settings)
    return [
        Choice(1000 * densities, 10 ** random.uniform(-3, 0) * (1 - densities) ** random.uniform(1.5, 4), densities)
        for _ in range(parts)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_better(seed: int) -> None:
    """Against all settings there are."""
    choices = curves(4, seed=seed)
    for limit in (800, 1500, 2500, 3900):
        picked = within_cost(choices, limit)
        assert total_cost(choices, picked) <= limit
        for other in itertools.product(range(6), repeat=4):
            if total_cost(choices, other) <= total_cost(choices, picked):
                assert total_damage(choices, other) >= total_damage(choices, picked) - 1e-12


def test_limits() -> None:
    choices = curves(30)
    reads = []
    for limit in (1e-6, 1e-3, 0.1, 1.0, 1e6):
        picked = within_damage(choices, limit)
        assert total_damage(choices, picked) <= limit
        reads.append(total_cost(choices, picked))
    assert reads == sorted(reads, reverse=True)
    assert reads[-1] == pytest.approx(3000)
    assert within_cost(choices, 1e9) == [0] * 30
    assert within_cost(choices, 0) == [5] * 30, "what cannot be kept is missed by as little as can be"
    assert within_damage(choices, 0) == [0] * 30


def test_fine_parts_use_the_limit_up() -> None:
    choices = curves(30, settings=40)
    for share in (0.3, 0.5, 0.9):
        assert total_cost(choices, within_cost(choices, share * 30000)) > 0.97 * share * 30000


def test_a_price() -> None:
    choices = curves(3)
    assert cheapest(choices, 0.0) == [0, 0, 0]
    assert cheapest(choices, 1e9) == [5, 5, 5]


def test_parts_without_a_choice() -> None:
    fixed = [Choice(np.array([7.0]), np.array([0.0]), ["only"])]
    assert within_cost(fixed, 1) == within_damage(fixed, 0) == [0]
