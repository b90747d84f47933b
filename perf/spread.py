"""Medians with their spread, and ratios pair by pair: what every table of the harness is made of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Spread = dict[str, float]  # median, min, max


def spread(values: Sequence[float]) -> Spread:
    """The median of some samples and how far they lie apart."""
    return {"median": rounded(statistics.median(values)), "min": rounded(min(values)), "max": rounded(max(values))}


def pairwise(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as much ours is: sample by sample, so that what slowed a whole round cancels out."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def rounded(value: float) -> float:
    """Five significant digits, which is more than a measurement has."""
    return float(f"{value:.5g}")


def shown(value: Spread | None, digits: int = 1) -> str:
    """`12.3 (11.9..12.8)`, or a dash."""
    if value is None:
        return "-"
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f}..{value['max']:.{digits}f})"
