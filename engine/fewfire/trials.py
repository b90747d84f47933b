"""Trying settings on the part of the sample that nothing was fitted to: what each costs, reads, and takes of time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewfire import damage, timing
from fewfire.calibration import WORK, Calibration, Densities
from fewfire.config import EXACT_ZEROS
from fewfire.damage import Damage
from fewfire.selectors.choices import governed_bytes
from fewfire.selectors.methods import KINDS, parse
from fewfire.selectors.selection import Selection
from fewfire.windows import some

_SCORED = 4096  # tokens that a trial decodes, at most
_MARGIN = 1.28  # standard errors: a budget is kept with a probability of 90 %
_ADJUSTED = 256  # tokens that tell what share is read
_ADJUSTMENTS = 6
_ENOUGH = 0.002  # of density is close enough


@dataclass(frozen=True)
class Trial:
    """A setting and what it does to the held-out part of the sample."""

    method: str
    densities: Densities
    density: float
    measured: dict[str, Any]  # as in `About`: tokens, growth, growth_error, kl, agreement, bytes_per_token
    worse_kl: float  # as in `Damage`

    @property
    def bound(self) -> float:
        """What perplexity grows by, at most as far as can be told.

        The divergence counts as well: it is what perplexity would grow by on text that the model says itself, and it
        scatters so little that its error needs no margin. Since other text may be harder than the sample, it is that of
        the sample's harder half (perf/LOG.md, "where a screen's damage is").
        """
        grown = self.measured["growth"] + _MARGIN * self.measured["growth_error"]
        return max(float(grown), math.expm1(min(self.worse_kl, damage.LARGEST)))


def scored(work: Calibration) -> int:
    """Tokens of a trial that decides."""
    return max(512, min(_SCORED, int(WORK / work.packed.bytes_per_token())))


def density(work: Calibration, method: str, bytes_per_token: float, uncalibrated: float) -> float:
    """The share read of the bytes that a method may leave out, with all that it reads in addition.

    uncalibrated: bytes that a token reads without it, with a ReLU's zeros left out: those do not count for a method
    that has nothing to do with neurons.
    """
    kinds = parse(method).kinds
    neurons = any(KINDS[kind].part == "ffn" for kind in kinds)
    left_out = (work.packed.bytes_per_token() if neurons else uncalibrated) - bytes_per_token
    return 1 - left_out / governed_bytes(work.packed, kinds)


def trial(work: Calibration, method: str, densities: Densities, tokens: int, stage: str) -> Trial:
    """Measures a setting on about so many tokens of the held-out part."""
    cut = some(work.held, tokens)
    dense = work.dense(f"dense-held-{tokens}", cut)

    def compute() -> dict[str, Any]:
        work.model.engine.select(work.selection(method, densities), progress=work.progress)
        found = damage.measure(work.model, cut, dense, work.progress, stage)
        return {**_summary(found), "worse_kl": found.worse_kl}

    measured = dict(work.notebook.number(f"trial {method} {digest(densities)} {tokens}", compute))
    worse_kl = measured.pop("worse_kl")
    share = density(work, method, measured["bytes_per_token"], float(dense.read.mean()))
    return Trial(method, densities, share, measured, worse_kl)


def adjusted(work: Calibration, method: str, density: float, pick: Callable[[float], Densities]) -> Densities:
    """What `pick` gives for the share with which the kernels read a share `density`, by their own count."""
    share, closest = density, (math.inf, Densities())
    for number in range(_ADJUSTMENTS):
        picked = pick(min(share, 1.0))
        found = trial(work, method, picked, _ADJUSTED, f"adjusting {method} ({number + 1})")
        closest = min(closest, (abs(found.density - density), picked), key=lambda each: each[0])
        if closest[0] < _ENOUGH:
            break
        share *= density / max(found.density, 1e-3)
    return closest[1]


def fastest(work: Calibration, trials: Sequence[Trial]) -> tuple[int, float, float]:
    """The number of the fastest trial, how much faster than dense it decodes, and than without a calibration."""

    def compute() -> list[float]:
        selected = [work.as_loaded(t.method, t.densities) for t in trials]
        uncalibrated = Selection("exact")  # which is dense in models without exact zeros
        return timing.side_by_side(work.model, [None, uncalibrated, *selected], work.held[0], work.progress)

    key = "fastest " + "".join(f"{t.method} {digest(t.densities)} " for t in trials)
    dense, uncalibrated, *times = work.notebook.number(key, compute)
    best = int(np.argmin(times))
    if work.packed.config.hidden_act not in EXACT_ZEROS:
        uncalibrated = dense
    return best, dense / times[best], uncalibrated / times[best]


def digest(densities: Densities) -> str:
    """Names a setting in the notebook."""
    return hashlib.sha256(repr(sorted(densities.items())).encode()).hexdigest()[:16]


def _summary(found: Damage) -> dict[str, Any]:
    """A damage as `About` wants it."""
    return {
        "tokens": len(found.kl),
        "growth": found.growth,
        "growth_error": found.error,
        "kl": float(found.kl.mean()),
        "agreement": float(found.agree.mean()),
        "bytes_per_token": round(found.bytes_per_token),
    }
