"""The largest damage that keeps within a budget, found with few measurements, each of which is slow and not exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_TRIALS = 8
_CLOSE = 0.92  # of the budget is close enough
_AIM = 0.97  # so that the next measurement keeps it


def search(attempt: Callable[[float], tuple[T, float]], budget: float, start: float) -> T | None:
    """The result of the largest limit whose cost is at most `budget`; None if none was found.

    attempt: takes a limit, over 0, and returns a result and its cost, which rises with the limit, nearly as a power of
    it. start: the limit to begin with.
    """
    below: tuple[float, float] | None = None  # limit, cost
    above: tuple[float, float] | None = None
    best, limit = None, start
    for _ in range(_TRIALS):
        result, cost = attempt(limit)
        if cost <= budget:
            best, below = result, (limit, cost)
            if cost >= _CLOSE * budget:
                break
        else:
            above = (limit, cost)
        limit = _next(below, above, budget)
        if below and above and above[0] / below[0] < 1.02:
            break
    return best


def _next(below: tuple[float, float] | None, above: tuple[float, float] | None, budget: float) -> float:
    """Where the cost should be just under the budget."""
    aim = _AIM * budget
    if below and above:
        # Costs under the noise say only that they are small.
        low, high = math.log(max(below[1], 0.05 * budget)), math.log(above[1])
        share = (math.log(aim) - low) / (high - low) if high > low else 0.5
        return below[0] * (above[0] / below[0]) ** min(max(share, 0.1), 0.9)
    if below:
        return below[0] * min(max(aim / max(below[1], 1e-9), 1.2), 3.0)
    assert above
    return above[0] * max(min(aim / above[1], 0.85), 0.1)
