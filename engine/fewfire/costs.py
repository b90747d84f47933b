"""What leaving out saves in time: kinds are timed alone, settings beside each other (`timing.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewfire import timing
from fewfire.calibration import Calibration
from fewfire.config import EXACT_ZEROS
from fewfire.selectors.choices import Cost, in_time
from fewfire.selectors.fits import Fit
from fewfire.selectors.methods import KINDS, Method
from fewfire.selectors.selection import Selection
from fewfire.trials import Trial, digest

_TIMED = (0.3, 0.6, 0.85)  # densities of layers at which the cost of leaving out is timed
_TIMED_ERROR, _TIMED_HEAD = 0.003, 0.3  # nats of KL divergence that the head is timed at, and a density
_APART = 0.05


def costs(work: Calibration, kind: str) -> Cost:
    """What a kind costs in time, in bytes that take as long: measured with the kind alone, everywhere alike."""
    fits, count = work.fits(kind), len(work.fits(kind))
    densities = _timed(kind, fits)
    if not densities:  # there is nothing to choose from
        return Cost(0.0)

    def compute() -> list[float]:
        alone = Method(kind, (kind,))
        selections = [work.selection(alone, {kind: [density] * count}) for density in densities]
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


def _timed(kind: str, fits: Sequence[Fit]) -> tuple[float, ...]:
    """Rising densities that a kind is timed at, in the range where calibrations mostly end up; none if it has one."""
    if KINDS[kind].part == "head":
        densities, errors = (fits[0][name][:-1] for name in ("densities", "errors"))
        if len(densities) < 2:
            return ()
        few = float(np.interp(-_TIMED_ERROR, -errors, densities))
        many = float(min(max(_TIMED_HEAD, few), densities[-1]))
        return (few, many) if few < many else (float(densities[0]), few)
    least = max(float(fit["densities"][0]) for fit in fits)
    firing = min(1.0, 2 * min(float(fit.get("firing", 1.0)) for fit in fits))
    found = list[float]()
    for share in _TIMED:
        found.append(max(share * firing, found[-1] + _APART if found else least))
    return tuple(found)
