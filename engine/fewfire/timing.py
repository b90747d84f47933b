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

_ROUNDS = 24
_TOKENS = 24  # of a turn, fewer where a turn would take more than so many seconds
_TURN = 0.5


def side_by_side(
    model: Model, selections: Sequence[Selection | None], window: Sequence[int], progress: Progress = silent
) -> list[float]:
    """Seconds that a token takes with each selection (None: dense), decoded after the first half of a window.

    Of the first it is the median over rounds; of the others the median of what they take of the first's time in the
    same round, which scatters far less. Raises `ValueError` for a window of fewer than 8 tokens.
    """
    if len(window) < 8:
        raise ValueError(f"a window of {len(window)} tokens is too short to time anything with: at least 8 are needed")
    session, half = model.session(), len(window) // 2
    session.feed(window[: half - 1])
    model.engine.select(selections[0], dense=selections[0] is None, progress=progress)
    start = time.perf_counter()
    session.feed([window[half - 1]])
    fitting = int(_TURN / (time.perf_counter() - start))
    tokens = window[half : half + min(_TOKENS, max(4, fitting))]
    seconds: list[list[float]] = [[] for _ in selections]
    for turn in range(_ROUNDS + 1):
        progress("timing", turn, _ROUNDS + 1)
        for selection, found in zip(selections, seconds, strict=True):
            model.engine.select(selection, dense=selection is None, progress=progress)
            session.rewind(half)
            start = time.perf_counter()
            for token in tokens:
                session.feed([token])
            found.append((time.perf_counter() - start) / len(tokens))
    first, *rest = [found[1:] for found in seconds]  # the first turn warms up
    base = statistics.median(first)
    return [base, *(base * statistics.median(t / b for t, b in zip(found, first, strict=True)) for found in rest)]
