"""The search for the largest limit within a budget."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.budget import search


@pytest.mark.parametrize("power", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("factor", [0.01, 1.0, 30.0])
def test_comes_close_with_few_trials(power: float, factor: float) -> None:
    tried = []

    def attempt(limit: float) -> tuple[float, float]:
        tried.append(limit)
        return limit, factor * limit**power

    found = search(attempt, 0.01, 0.01)
    assert found is not None
    assert 0.0085 <= factor * found**power <= 0.01
    assert len(tried) <= 8


def test_keeps_the_budget_with_noise() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        costs: dict[float, float] = {}

        def attempt(limit: float, costs: dict[float, float] = costs) -> tuple[float, float]:
            costs[limit] = 2 * limit + random.normal(0, 0.002)
            return limit, costs[limit]

        found = search(attempt, 0.01, 0.01)
        assert found is not None
        assert costs[found] <= 0.01


def test_none() -> None:
    assert search(lambda limit: (limit, 1.0), 0.01, 0.01) is None


def test_everything_can_go() -> None:
    """Costs that do not rise end the search with the largest limit that was tried."""
    found = search(lambda limit: (limit, 0.0), 0.01, 0.01)
    assert found is not None
    assert found > 1
