"""What leaving out saves in time: kinds are timed alone, settings beside each other (`timing.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewfire import timing
from fewfire.calibration import Calibration
from fewfire.config import EXACT_ZEROS
from fewfire.selectors.choices import Cost, in_time
from fewfire.selectors.fits import Fit
from fewfire.selectors.methods import KINDS, Method, selection
from fewfire.selectors.selection import Selection
from fewfire.trials import Trial, digest

_TIMED = (0.3, 0.6)  # densities of layers at which the cost of leaving out is timed
_TIMED_ERRORS = (0.03, 0.003)  # nats of KL divergence; of the head


def costs(work: Calibration, kind: str) -> Cost:
    """What a kind costs in time, in bytes that take as long: measured with the kind alone, everywhere alike."""
    fits, count = work.fits(kind), len(work.fits(kind))
    densities = _timed(kind, fits)
    if densities[1] >= 1:  # there is nothing to choose from
        return Cost(0.0)

    def compute() -> list[float]:
        alone = Method(kind, (kind,))
        selections = [selection(work.packed, alone, {kind: fits}, {kind: [d] * count}) for d in densities]
        return timing.side_by_side(work.model, [None, *selections], work.held[0], work.progress)

    dense, *times = work.notebook.number(f"times {kind}", compute)
    a_second = work.packed.bytes_per_token() / dense
    saved = {density: (dense - t) * a_second for density, t in zip(densities, times, strict=True)}
    return in_time(work.packed, kind, fits, saved)


def fastest(work: Calibration, trials: Sequence[Trial]) -> tuple[int, float, float]:
    """The number of the fastest trial, how much faster than dense it decodes, and than without a calibration."""

    def compute() -> list[float]:
        selected = [work.selection(t.method, t.densities) for t in trials]
        uncalibrated = Selection("exact")  # which is dense in models without exact zeros
        return timing.side_by_side(work.model, [None, uncalibrated, *selected], work.held[0], work.progress)

    key = "fastest " + "".join(f"{t.method} {digest(t.densities)} " for t in trials)
    dense, uncalibrated, *times = work.notebook.number(key, compute)
    best = int(np.argmin(times))
    if work.packed.config.hidden_act not in EXACT_ZEROS:
        uncalibrated = dense
    return best, dense / times[best], uncalibrated / times[best]


def _timed(kind: str, fits: Sequence[Fit]) -> tuple[float, float]:
    """Two densities that a kind is timed at, in the range where calibrations mostly end up."""
    if KINDS[kind].part == "head":
        densities, errors = (fits[0][name][:-1] for name in ("densities", "errors"))
        if len(densities) < 2:
            return 1.0, 1.0
        low, high = (float(np.interp(-error, -errors, densities)) for error in _TIMED_ERRORS)
        return (low, high) if low < high else (float(densities[0]), float(densities[-1]))
    least = max(float(fit["densities"][0]) for fit in fits)
    firing = min(1.0, 2 * min(float(fit.get("firing", 1.0)) for fit in fits))
    low, high = (max(share * firing, least) for share in _TIMED)
    return low, max(high, low + 0.05)
