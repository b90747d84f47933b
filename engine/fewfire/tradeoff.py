"""Density against perplexity: what methods cost at several densities, on text that nothing was fitted to.

Each method is calibrated on one part of a text as `calibrate.py` does it for a density, and decodes another one beside
the dense model. That shows how far one can go with a method, and which to choose, before a model is calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fewfire import calibrate, choosing, damage, trials
from fewfire.calibration import Calibration, Densities
from fewfire.damage import Dense
from fewfire.progress import Progress, silent
from fewfire.selectors.methods import missed
from fewfire.windows import some

if TYPE_CHECKING:
    from fewfire.model import Model


@dataclass(frozen=True)
class Point:
    """A method at a density; growth, KL and agreement are those of `damage.Damage`."""

    method: str
    asked: float  # the density that was wanted
    density: float  # share of the bytes of the rows that the method may leave out, read by the kernels' own count
    densities: Densities  # by kind and layer
    growth: float  # of perplexity against dense: 0.01 is 1 %
    growth_error: float | None  # standard error of that, None where there is too little text to tell
    kl: float  # mean KL divergence from dense, in nats
    agreement: float  # share of tokens where both have the same most probable next one
    bytes_per_token: float  # of weights
    missed: float | None  # upper bound (95 %) on the share of tokens whose likeliest next one a screened head misses


@dataclass(frozen=True)
class Tradeoff:
    """Points of several methods on one text."""

    model: str
    weights: str
    tokens: int  # scored
    perplexity: float  # of the dense model
    dense_bytes_per_token: int
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


class Judge:
    """Windows of tokens that say what settings of a calibration cost. Changes what the engine selects."""

    def __init__(self, work: Calibration, windows: Sequence[list[int]]) -> None:
        self._work, self.windows = work, windows
        self.tokens = sum(len(window) - 1 for window in windows)

    @cached_property
    def dense(self) -> Dense:
        """What the model says without a selection, with a ReLU's zeros left out (as `Calibration.dense`)."""
        self._work.model.engine.select(None, progress=self._work.progress)
        return damage.observe_dense(self._work.model, self.windows, self._work.progress)

    @property
    def perplexity(self) -> float:
        """Of the dense model."""
        return math.exp(-float(self.dense.target.mean()))

    def points(
        self, method: str, densities: Sequence[float], pick: Callable[[float], Densities] | None = None
    ) -> list[Point]:
        """A method at several densities, spread over the layers by `pick`, as `trials.adjusted` takes it.

        pick: `choosing.spread` if None. Raises `ValueError` for a method that the model cannot have.
        """
        pick = choosing.spread(self._work, method) if pick is None else pick
        return [self._point(method, asked, trials.adjusted(self._work, method, asked, pick)) for asked in densities]

    def _point(self, method: str, asked: float, picked: Densities) -> Point:
        work, dense = self._work, self.dense
        work.model.engine.select(work.selection(method, picked), progress=work.progress)
        found = damage.measure(work.model, self.windows, dense, work.progress, f"measuring {method} at {asked:g}")
        return Point(
            method=method,
            asked=asked,
            density=trials.density(work, method, found.bytes_per_token, float(dense.read.mean())),
            densities=picked,
            growth=found.growth,
            growth_error=found.error if math.isfinite(found.error) else None,
            kl=float(found.kl.mean()),
            agreement=float(found.agree.mean()),
            bytes_per_token=found.bytes_per_token,
            missed=missed({kind: work.fits(kind) for kind in picked}, picked),
        )


def tradeoff(
    model: Model,
    methods: Sequence[str],
    densities: Sequence[float],
    *,
    text: str | None = None,
    tokens: int = 2048,
    progress: Progress = silent,
) -> Tradeoff:
    """Measures methods at densities on at most so many tokens of a text's held-out part.

    text: the default sample if None. The engine is borrowed: sessions in other threads wait, and what it selects comes
    back. What was fitted stays with the packed model for a week: `calibrate` with the same text goes on from there.
    Raises what `calibrate` raises for a method and a density.
    """
    check(methods, densities, tokens)
    work = Calibration(model, calibrate.sample_text() if text is None else text, progress)
    with closing(work.notebook), model.engine.borrowed():
        work.fit(methods)
        judge = Judge(work, some(work.held, tokens))
        points = tuple(point for method in methods for point in judge.points(method, densities))
        dense_bytes = model.packed.bytes_per_token()
        return Tradeoff(model.packed.name, model.packed.weights, judge.tokens, judge.perplexity, dense_bytes, points)


def check(methods: Sequence[str], densities: Sequence[float], tokens: int) -> None:
    """Raises `ValueError` for what `tradeoff` does not take."""
    for method in methods:
        for density in densities:
            calibrate.check(method, density, None)
    if tokens < 2:
        raise ValueError(f"tokens must be at least 2, or there is nothing to score, not {tokens}")
