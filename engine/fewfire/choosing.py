"""Choosing the densities of all parts of a model: for a share of the bytes, or for a budget of growing perplexity.

What a fit says is lost, times what that means to the predictions (`probes.py`), against bytes: `spread.py` finds the
densities that do the least damage for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fewfire import spread as spreading
from fewfire.budget import search
from fewfire.calibration import Calibration, Densities
from fewfire.probes import weights
from fewfire.selectors.choices import choices, governed_bytes
from fewfire.selectors.methods import parse
from fewfire.spread import Choice
from fewfire.trials import Trial, scored, trial


def options(work: Calibration, method: str, probed: bool = True) -> list[Choice]:
    """What every part of the model has to choose from; the damage is in nats of KL divergence.

    Not `probed`: an error of 1 in the output is as bad in one layer as in another (TEAL, 2408.14690).
    """
    work.fit([method])
    fits = {kind: work.fits(kind) for kind in parse(method).kinds}
    meant = {kind: weights(work, kind) if probed else [1.0] * len(fits[kind]) for kind in fits}
    return choices(work.packed, fits, meant)


def spread(work: Calibration, method: str) -> Callable[[float], Densities]:
    """From a share of the bytes to the densities that do the least damage with it."""
    parts, governed = options(work, method), governed_bytes(work.packed, parse(method).kinds)
    return lambda share: _densities(parts, spreading.within_cost(parts, share * governed))


def greedy(work: Calibration, method: str) -> Callable[[float], Densities]:
    """The same one step at a time, a baseline, which knows errors but not what they mean."""
    parts, governed = options(work, method, probed=False), governed_bytes(work.packed, parse(method).kinds)
    return lambda share: _densities(parts, spreading.greedy(parts, share * governed))


def uniform(work: Calibration, method: str) -> Callable[[float], Densities]:
    """The same density everywhere, another baseline."""
    work.fit([method])
    fits = {kind: work.fits(kind) for kind in parse(method).kinds}
    return lambda share: {k: [max(share, float(fit["densities"][0])) for fit in v] for k, v in fits.items()}


def within(work: Calibration, budget: float, method: str, start: float, stage: str) -> tuple[Trial, float] | None:
    """The setting that should read least within a budget of growing perplexity, and its predicted damage.

    start: the damage to begin with, in nats. None if nothing keeps the budget.
    """
    parts = options(work, method)

    def attempt(limit: float) -> tuple[tuple[Trial, float], float]:
        picked = _densities(parts, spreading.within_damage(parts, limit))
        found = trial(work, method, picked, scored(work), stage)
        return (found, limit), found.bound

    return search(attempt, budget, start)


def _densities(parts: Sequence[Choice], picked: Sequence[int]) -> Densities:
    """Densities by kind and layer."""
    found: Densities = {}
    for choice, number in zip(parts, picked, strict=True):
        setting: Any = choice.settings[number]
        for kind, density in setting.items():
            found.setdefault(kind, []).append(density)
    return found
