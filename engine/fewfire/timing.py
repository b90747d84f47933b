"""Decode times of several selections, side by side: they take turns, so that what else the machine does meets all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fewfire.progress import Progress, silent
from fewfire.selectors.selection import Selection

if TYPE_CHECKING:
    from fewfire.model import Model

_ROUNDS = 8
_TOKENS = 24


def side_by_side(
    model: Model, selections: Sequence[Selection | None], window: Sequence[int], progress: Progress = silent
) -> list[float]:
    """Median seconds that a token takes with each selection (None: dense), decoded after the first half of a window."""
    session, half = model.session(), max(2, len(window) // 2)
    tokens = window[half : half + _TOKENS]
    session.feed(window[:half])
    seconds: list[list[float]] = [[] for _ in selections]
    for turn in range(_ROUNDS + 1):
        progress("timing", turn, _ROUNDS + 1)
        for selection, found in zip(selections, seconds, strict=True):
            model.engine.select(selection, dense=selection is None)
            session.rewind(half)
            start = time.perf_counter()
            for token in tokens:
                session.feed([token])
            found.append((time.perf_counter() - start) / len(tokens))
    return [statistics.median(found[1:]) for found in seconds]  # the first turn warms up
