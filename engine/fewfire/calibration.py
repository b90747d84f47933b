"""The steps of a calibration: fitting, probing, choosing densities, and trying them, each kept in a notebook.

The sample is divided. Most of it is observed (`observe.py`), and for every layer the kinds of a method are fitted
(`selectors/methods.py`): that says which share of a layer's output is lost at which density. What such a loss means to
the predictions differs from layer to layer and is measured, by leaving something out in one layer alone; the two
together spread a density over the parts of the model (`spread.py`). The rest of the sample, which nothing was fitted
to, says what it costs in the end (`damage.py`).

Promises that a killed calibration, made again, goes on where it stopped and comes to the same result. Uses the engine
alone, and changes what it selects: it is to be borrowed meanwhile (`Engine.borrowed`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fewfire import damage, spread, timing
from fewfire.budget import search
from fewfire.config import EXACT_ZEROS
from fewfire.damage import Damage, Dense
from fewfire.notebook import Notebook
from fewfire.observe import Observation
from fewfire.progress import Progress, silent
from fewfire.revision import revision
from fewfire.selectors import store
from fewfire.selectors.choices import Cost, choices, governed_bytes, in_bytes, in_time
from fewfire.selectors.fits import Fit
from fewfire.selectors.methods import KINDS, Method, parse, selection
from fewfire.selectors.selection import Selection
from fewfire.windows import some, windows

if TYPE_CHECKING:
    from fewfire.model import Model

_WINDOW = 256
_HELD = 0.25  # share of the sample that nothing is fitted to
_FITTED = 8192  # tokens that are observed, fewer where they would take more than so many bytes in one layer
_OBSERVED_BYTES = 2**29
_SCORED = 4096  # tokens that a trial decodes, at most
_PROBED = 384  # tokens that tell what a layer's error means, at most
_WORK = 1.2e12  # bytes of weights that the probes of one kind, or a trial, may read
_LEAST = 512  # tokens that a sample must have
_PIECES = 8  # windows that there must be at least
_PROBE_DENSITY = 0.3  # whose error, in the middle layer, all layers are probed at
_MARGIN = 1.28  # standard errors: a budget is kept with a probability of 90 %
_ADJUSTED = 256  # tokens that tell what share is read
_ADJUSTMENTS = 6
_TIMED = (0.3, 0.6)  # densities of layers at which the cost of leaving out is timed
_TIMED_ERRORS = (0.03, 0.003)  # nats of KL divergence; of the head
_ENOUGH = 0.002  # of density is close enough

Densities = dict[str, list[float]]  # by kind and layer; of the head there is one


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
        scatters far less than that. Since other text may be harder than the sample, it is that of the sample's harder
        half (perf/LOG.md, "where a screen's damage is").
        """
        grown = max(self.measured["growth"], math.expm1(self.worse_kl))
        return float(grown + _MARGIN * self.measured["growth_error"])


class Calibration:
    """A model and a sample. Raises `ValueError` for a text that is too short."""

    def __init__(self, model: Model, text: str, progress: Progress = silent) -> None:
        self.model, self.packed, self.progress = model, model.packed, progress
        tokens = len(model.tokenizer.encode(text))
        if tokens < _LEAST:
            raise ValueError(f"the text has {tokens} tokens, too few to calibrate on: at least {_LEAST} are needed")
        size = min(_WINDOW, model.context, tokens // _PIECES)
        cut = windows(model.tokenizer, model.config, text, size)
        cut = [window for window in cut if len(window) > size // 2]
        held = max(1, round(_HELD * len(cut)))
        self.fitted, self.held = cut[:-held], cut[-held:]
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        key = [revision(), store.model_digest(model.packed), digest, model.context, model.threads]
        self.notebook = Notebook(model.packed.path, key)
        self._fits: dict[str, list[Fit]] = {}
        self._said: dict[str, Dense] = {}

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _dense(self, name: str, cut: list[list[int]]) -> Dense:
        """What the dense model says about windows."""
        if name not in self._said:
            found = self.notebook.arrays(name)
            if found is None:
                self.model.engine.select(None, dense=True)
                found = vars(damage.observe_dense(self.model, cut, self.progress))
                self.notebook.keep(name, **found)
            self._said[name] = Dense(**found)
        return self._said[name]

    def fit(self, methods: Sequence[str]) -> None:
        """Fits all that these methods need, and what they are probed with, in one pass over the sample."""
        kinds = dict.fromkeys(kind for method in methods for kind in parse(method).kinds)
        probes = dict.fromkeys(probe for kind in kinds if (probe := KINDS[kind].probe))
        self._fit([kind for kind in {**kinds, **probes} if kind not in self._fits])

    def fits(self, kind: str) -> list[Fit]:
        """A kind, fitted for every layer; of the head there is one."""
        if kind not in self._fits:
            self._fit([kind])
        return self._fits[kind]

    def _fit(self, kinds: Sequence[str]) -> None:
        """Fits kinds, unless the notebook has them."""
        layers = self.packed.config.num_hidden_layers
        counts = {kind: 1 if KINDS[kind].part == "head" else layers for kind in kinds}
        found = {kind: [self.notebook.arrays(f"{kind}-{i}") for i in range(n)] for kind, n in counts.items()}
        missing = [(kind, i) for kind, fits in found.items() for i, fit in enumerate(fits) if fit is None]

        def keep(kind: str, number: int, seen: Any) -> None:
            if (kind, number) in missing:
                found[kind][number] = fit = KINDS[kind].fit(self.packed, seen)
                if KINDS[kind].part == "ffn":
                    fit["firing"] = np.array(np.mean(seen.fired != 0))
                self.notebook.keep(f"{kind}-{number}", **fit)

        if missing:
            c = self.packed.config
            each = 4 * (4 * c.intermediate_size + 6 * c.hidden_size)  # bytes that a token takes in a layer
            sample = Observation(self.packed, some(self.fitted, min(_FITTED, _OBSERVED_BYTES // each)), self.progress)
            heads = [kind for kind in kinds if KINDS[kind].part == "head"]
            for layer in sample:
                for kind in kinds:
                    if kind not in heads:
                        keep(kind, layer.number, layer)
            for kind in heads:
                self.progress(f"fitting {kind}", 0, 1)
                keep(kind, 0, sample)
        self._fits |= {kind: [fit for fit in fits if fit is not None] for kind, fits in found.items()}

    def weights(self, kind: str) -> list[float]:
        """What an error of 1 in each layer's output means to the predictions: nats of KL divergence."""
        probe = KINDS[kind].probe
        if probe is None:
            return [1.0]
        fits, count = self.fits(probe), self.packed.config.num_hidden_layers
        decodes = _WORK / self.packed.bytes_per_token()
        tokens = max(48, min(_PROBED, int(decodes / count)))
        groups = np.array_split(np.arange(count), max(1, min(count, int(decodes / tokens))))
        middle = fits[count // 2]
        density = _PROBE_DENSITY * float(middle.get("firing", 1.0))  # what is zero anyway does no damage
        level = float(np.interp(density, middle["densities"], middle["errors"]))
        found, cut = list[float](), some(self.fitted, tokens)
        dense = self._dense(f"dense-probe-{tokens}", cut)
        for number, group in enumerate(groups):
            picked = [_density_for(fit, level) if i in group else 1.0 for i, fit in enumerate(fits)]

            def compute(picked: list[float] = picked, number: int = number) -> float:
                self.model.engine.select(self.selection(probe, {probe: picked}))
                self.progress(f"probing {probe}", number, len(groups))
                return float(damage.measure(self.model, cut, dense).kl.mean())

            kl = self.notebook.number(f"probe {probe} {group[0]}-{group[-1]}", compute)
            error = sum(float(np.interp(picked[i], fits[i]["densities"], fits[i]["errors"])) for i in group)
            found += [max(kl, 1e-9) / max(error, 1e-12)] * len(group)
        self.progress(f"probing {probe}", len(groups), len(groups))
        return found

    def selection(self, method: str, densities: Densities) -> Selection:
        """The selection of a method at densities by kind and layer."""
        return selection(self.packed, parse(method), {kind: self.fits(kind) for kind in densities}, densities)

    def trial(self, method: str, densities: Densities, tokens: int, stage: str) -> Trial:
        """Measures a setting on about so many tokens of the held-out part."""

        def compute() -> dict[str, Any]:
            cut = some(self.held, tokens)
            dense = self._dense(f"dense-held-{tokens}", cut)
            self.model.engine.select(self.selection(method, densities))
            found = damage.measure(self.model, cut, dense, self.progress, stage)
            return {**_summary(found), "worse_kl": found.worse_kl}

        measured = dict(self.notebook.number(f"trial {method} {_digest(densities)} {tokens}", compute))
        worse_kl = measured.pop("worse_kl")
        return Trial(method, densities, self.density(method, measured["bytes_per_token"]), measured, worse_kl)

    def density(self, method: str, bytes_per_token: float) -> float:
        """The share read of the bytes that a method may leave out, with all that it reads in addition."""
        left_out = self.packed.bytes_per_token() - bytes_per_token
        return 1 - left_out / governed_bytes(self.packed, parse(method).kinds)

    @property
    def scored(self) -> int:
        """Tokens of a trial that decides."""
        return max(512, min(_SCORED, int(_WORK / self.packed.bytes_per_token())))

    def costs(self, kind: str) -> Cost:
        """What a kind costs in time, in bytes that take as long: measured with the kind alone, everywhere alike."""
        fits, count = self.fits(kind), len(self.fits(kind))
        densities = _timed(kind, fits)
        if densities[1] >= 1:  # there is nothing to choose from
            return Cost(0.0)

        def compute() -> list[float]:
            alone = Method(kind, (kind,))
            selections = [selection(self.packed, alone, {kind: fits}, {kind: [d] * count}) for d in densities]
            return timing.side_by_side(self.model, [None, *selections], self.held[0], self.progress)

        dense, *times = self.notebook.number(f"times {kind}", compute)
        a_second = self.packed.bytes_per_token() / dense
        saved = {density: (dense - t) * a_second for density, t in zip(densities, times, strict=True)}
        return in_time(self.packed, kind, fits, saved)

    # --- choosing -----------------------------------------------------------------------------------------------------

    def choices(self, method: str, probed: bool = True, timed: bool = False) -> list[spread.Choice]:
        """What every part of the model has to choose from; the damage is in nats of KL divergence.

        Not `probed`: an error of 1 in the output is as bad in one layer as in another (TEAL, 2408.14690). `timed`:
        costs stand for time, else for bytes.
        """
        self.fit([method])
        fits = {kind: self.fits(kind) for kind in parse(method).kinds}
        weights = {kind: self.weights(kind) if probed else [1.0] * len(fits[kind]) for kind in fits}
        costs = {kind: self.costs(kind) for kind in fits} if timed else in_bytes(self.packed, fits)
        return choices(self.packed, fits, weights, costs)

    def spread(self, method: str) -> Callable[[float], Densities]:
        """From a share of the bytes to the densities that do the least damage with it."""
        options, governed = self.choices(method), governed_bytes(self.packed, parse(method).kinds)
        return lambda share: _densities(options, spread.within_cost(options, share * governed))

    def greedy(self, method: str) -> Callable[[float], Densities]:
        """The same one step at a time, a baseline, which knows errors but not what they mean."""
        options, governed = self.choices(method, probed=False), governed_bytes(self.packed, parse(method).kinds)
        return lambda share: _densities(options, spread.greedy(options, share * governed))

    def uniform(self, method: str) -> Callable[[float], Densities]:
        """The same density everywhere, another baseline."""
        self.fit([method])
        fits = {kind: self.fits(kind) for kind in parse(method).kinds}
        return lambda share: {k: [max(share, float(fit["densities"][0])) for fit in v] for k, v in fits.items()}

    def adjusted(self, method: str, density: float, pick: Callable[[float], Densities]) -> Densities:
        """What `pick` gives for the share with which the kernels read a share `density`, by their own count."""
        share, closest = density, (math.inf, Densities())
        for number in range(_ADJUSTMENTS):
            picked = pick(min(share, 1.0))
            trial = self.trial(method, picked, _ADJUSTED, f"adjusting {method} ({number + 1})")
            closest = min(closest, (abs(trial.density - density), picked), key=lambda each: each[0])
            if closest[0] < _ENOUGH:
                break
            share *= density / max(trial.density, 1e-3)
        return closest[1]

    def fastest(self, trials: Sequence[Trial]) -> tuple[int, float, float]:
        """The number of the fastest trial, how much faster than dense it decodes, and than without a calibration."""

        def compute() -> list[float]:
            selected = [self.selection(t.method, t.densities) for t in trials]
            uncalibrated = Selection("exact")  # which is dense in models without exact zeros
            return timing.side_by_side(self.model, [None, uncalibrated, *selected], self.held[0], self.progress)

        key = "fastest " + "".join(f"{t.method} {_digest(t.densities)} " for t in trials)
        dense, uncalibrated, *times = self.notebook.number(key, compute)
        best = int(np.argmin(times))
        if self.packed.config.hidden_act not in EXACT_ZEROS:
            uncalibrated = dense
        return best, dense / times[best], uncalibrated / times[best]

    def likely(self, methods: Sequence[str], limit: float) -> list[str]:
        """The methods that should be fastest where so much damage is done, in nats, the fastest first."""
        self.fit(methods)
        cost = dict[str, float]()
        for method in methods:
            options = self.choices(method, timed=True)
            governed = governed_bytes(self.packed, parse(method).kinds)
            cost[method] = spread.total_cost(options, spread.within_damage(options, limit)) - governed
        return sorted(methods, key=lambda method: cost[method])

    def within(self, budget: float, method: str, start: float, stage: str) -> tuple[Trial, float] | None:
        """The setting that should be fastest within a budget of growing perplexity, and its predicted damage.

        start: the damage to begin with, in nats. None if nothing keeps the budget.
        """
        options = self.choices(method, timed=True)

        def attempt(limit: float) -> tuple[tuple[Trial, float], float]:
            picked = _densities(options, spread.within_damage(options, limit))
            trial = self.trial(method, picked, self.scored, stage)
            return (trial, limit), trial.bound

        return search(attempt, budget, start)


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


def _digest(densities: Densities) -> str:
    return hashlib.sha256(repr(sorted(densities.items())).encode()).hexdigest()[:16]


def _density_for(fit: Fit, error: float) -> float:
    """The density at which a layer loses so much, in the range that was fitted."""
    found = float(np.interp(-error, -fit["errors"], fit["densities"]))
    return min(max(found, float(fit["densities"][0])), 0.95)


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


def _densities(options: Sequence[spread.Choice], picked: Sequence[int]) -> Densities:
    """Densities by kind and layer."""
    found: Densities = {}
    for choice, number in zip(options, picked, strict=True):
        setting: Any = choice.settings[number]
        for kind, density in setting.items():
            found.setdefault(kind, []).append(density)
    return found
