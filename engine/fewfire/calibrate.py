"""Calibrating: from a sample text to the selection that leaves out most for a density or a budget of quality.

The sample is divided. Most of it is observed (`observe.py`), and for every layer the kinds of a method are fitted
(`selectors/methods.py`): that says which share of a layer's output is lost at which density. What such a loss means to
the predictions differs from layer to layer and is measured, by leaving something out in one layer alone; the two
together spread a density over the layers (`spread.py`). The rest of the sample, which nothing was fitted to, says what
it costs in the end (`damage.py`), and a budget is kept there with a margin for the error of the measurement.

Promises that the calibration is there whole at the end or the old one still is, and that a killed calibration goes on
where it stopped and comes to the same result. Uses the engine alone: no session may decode meanwhile.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewfire import damage, spread, timing
from fewfire.budget import search
from fewfire.damage import Damage, Dense
from fewfire.errors import FewfireError
from fewfire.notebook import Notebook
from fewfire.observe import Observation
from fewfire.progress import Progress, silent
from fewfire.selectors import store
from fewfire.selectors.methods import KINDS, USUAL, Fit, choices, governed_bytes, kinds_of, selection
from fewfire.selectors.store import About
from fewfire.windows import windows

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
_PROBE_DENSITY = 0.3  # whose error, in the middle layer, all layers are probed at
_MARGIN = 1.28  # standard errors: the budget is kept with a probability of 90 %


def sample_text() -> str:
    """The default sample: what the default model says by itself, given all sorts of beginnings (perf/sample.py)."""
    return (Path(__file__).parent / "sample.txt").read_text(encoding="utf-8")


def calibrate(
    model: Model,
    *,
    method: str | None = None,
    density: float | None = None,
    budget: float | None = None,
    text: str | None = None,
    progress: Progress = silent,
) -> About:
    """Calibrates a model, writes the result next to its weights, and lets the model use it. Returns what was measured.

    method: "gate", "down", or several joined with "+"; None: with a budget, whatever is fastest. density: the share of
    the bytes of the rows which the method may leave out that is to be read, on average, over 0 and at most 1. budget:
    by how much perplexity may grow, 0.01 for 1 %. Exactly one of the two. text: sample text of the user's.

    Raises `ValueError` for an impossible option or a text that is too short, `FewfireError` if no setting keeps the
    budget or the result cannot be written.
    """
    check(method, density, budget)
    store.check_writable(model.packed)
    name = "the default sample" if text is None else "text of the user's"
    work = _Calibration(model, sample_text() if text is None else text, progress)
    try:
        if density is not None:
            assert method is not None
            trials = [work.with_density(method, density)]
        else:
            assert budget is not None
            trials = work.with_budget((method,) if method else USUAL, budget)
        best, speedup = work.fastest(trials)
        chosen, asked = trials[best], {"density": density} if density is not None else {"budget": budget}
        about = About(
            method=chosen.method,
            density=chosen.density,
            densities={k: [float(d) for d in v] for k, v in chosen.densities.items()},
            settings=asked,
            sample=name,
            **chosen.measured,
            dense_bytes_per_token=work.dense_bytes,
            speedup=speedup,
            tried=[{"method": t.method, "density": t.density, **t.measured} for t in trials],
        )
        selected = work.selection(chosen.method, chosen.densities)
        store.save(model.packed, selected, about)
    finally:
        model.engine.select(None, dense=True)
    work.notebook.remove()
    model.engine.select(selected)
    return about


def check(method: str | None, density: float | None, budget: float | None) -> None:
    """Raises `ValueError` for options that `calibrate` does not take."""
    if (density is None) == (budget is None):
        raise ValueError("give either a density or a budget, and not both")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must be over 0 and at most 1, not {density:g}")
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"budget must be over 0 (0.01 is 1 %), not {budget:g}")
    if method is None and density is not None:
        raise ValueError("a density needs a method: name one, or give a budget")
    if method is not None:
        kinds_of(method)


@dataclass(frozen=True)
class Trial:
    """A setting and what it does to the held-out part of the sample."""

    method: str
    densities: dict[str, list[float]]
    density: float
    measured: dict[str, Any]  # as in `About`: tokens, growth, growth_error, kl, agreement, bytes_per_token

    @property
    def bound(self) -> float:
        """What perplexity grows by, at most as far as can be told."""
        return float(self.measured["growth"] + _MARGIN * self.measured["growth_error"])


class _Calibration:
    """The steps of a calibration, each kept in the notebook."""

    def __init__(self, model: Model, text: str, progress: Progress) -> None:
        self.model, self.packed, self.progress = model, model.packed, progress
        cut = windows(model.tokenizer, model.config, text, min(_WINDOW, model.context))
        tokens = sum(len(window) for window in cut)
        if tokens < _LEAST or len(cut) < 4:
            raise ValueError(f"the text has {tokens} tokens, too few to calibrate on: at least {_LEAST} are needed")
        held = max(1, round(_HELD * len(cut)))
        self.fitted, self.held = cut[:-held], cut[-held:]
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        key = [store.VERSION, store.model_digest(model.packed), digest, model.context, model.threads]
        self.notebook = Notebook(model.packed.path, key)
        self._fits: dict[str, list[Fit]] = {}
        self._said: dict[str, Dense] = {}

    # --- measuring ----------------------------------------------------------------------------------------------------

    @cached_property
    def dense_bytes(self) -> int:
        """Weight bytes of a dense token."""
        self.model.engine.select(None, dense=True)
        self.model.session().feed(self.held[0][:1])
        return self.model.engine.bytes_read()

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

    def fits(self, kind: str) -> list[Fit]:
        """A kind, fitted for every layer."""
        if kind not in self._fits:
            self._fit_all([kind])
        return self._fits[kind]

    def _fit_all(self, kinds: Sequence[str]) -> None:
        """Fits kinds in one pass over the sample, unless the notebook has them."""
        count = self.packed.config.num_hidden_layers
        found = {k: [self.notebook.arrays(f"{k}-{i}") for i in range(count)] for k in kinds}
        if any(fit is None for fits in found.values() for fit in fits):
            c = self.packed.config
            each = 4 * (4 * c.intermediate_size + 6 * c.hidden_size)  # bytes that a token takes in a layer
            observed = _some(self.fitted, min(_FITTED, _OBSERVED_BYTES // each))
            for layer in Observation(self.packed, observed, self.progress):
                for kind in kinds:
                    if found[kind][layer.number] is None:
                        fit = KINDS[kind].fit(self.packed, layer)
                        self.notebook.keep(f"{kind}-{layer.number}", **fit)
                        found[kind][layer.number] = fit
        self._fits |= {k: [fit for fit in fits if fit is not None] for k, fits in found.items()}

    def weights(self, kind: str) -> list[float]:
        """What an error of 1 in each layer's output means to the predictions: nats of KL divergence."""
        probe = KINDS[kind].probe
        fits, count = self.fits(probe), self.packed.config.num_hidden_layers
        decodes = _WORK / self.dense_bytes
        tokens = max(48, min(_PROBED, int(decodes / count)))
        groups = np.array_split(np.arange(count), max(1, min(count, int(decodes / tokens))))
        level = float(np.interp(_PROBE_DENSITY, fits[count // 2]["densities"], fits[count // 2]["errors"]))
        found, cut = list[float](), _some(self.fitted, tokens)
        dense = self._dense(f"dense-probe-{tokens}", cut)
        for number, group in enumerate(groups):
            picked = [_density_for(fit, level) if i in group else 1.0 for i, fit in enumerate(fits)]

            def compute(picked: Sequence[float] = picked, number: int = number) -> float:
                self.model.engine.select(selection(self.packed, probe, {probe: fits}, {probe: picked}))
                self.progress(f"probing {probe}", number, len(groups))
                return float(damage.measure(self.model, cut, dense).kl.mean())

            kl = self.notebook.number(f"probe {probe} {group[0]}-{group[-1]}", compute)
            error = sum(float(np.interp(picked[i], fits[i]["densities"], fits[i]["errors"])) for i in group)
            found += [max(kl, 1e-9) / max(error, 1e-12)] * len(group)
        self.progress(f"probing {probe}", len(groups), len(groups))
        return found

    def selection(self, method: str, densities: dict[str, list[float]]) -> Any:
        """The selection of a method at densities by kind and layer."""
        return selection(self.packed, method, {k: self.fits(k) for k in kinds_of(method)}, densities)

    def trial(self, method: str, densities: dict[str, list[float]], tokens: int, stage: str) -> Trial:
        """Measures a setting on the held-out part."""

        def compute() -> dict[str, Any]:
            cut = _some(self.held, tokens)
            dense = self._dense(f"dense-held-{tokens}", cut)
            self.model.engine.select(self.selection(method, densities))
            return _summary(damage.measure(self.model, cut, dense, self.progress, stage))

        digest = hashlib.sha256(repr(sorted(densities.items())).encode()).hexdigest()[:16]
        measured = dict(self.notebook.number(f"trial {method} {digest} {tokens}", compute))
        governed = governed_bytes(self.packed, kinds_of(method))
        density = 1 - (self.dense_bytes - measured["bytes_per_token"]) / governed
        return Trial(method, densities, density, measured)

    def _scored(self) -> int:
        """Tokens of a trial."""
        return max(512, min(_SCORED, int(_WORK / self.dense_bytes)))

    # --- choosing -----------------------------------------------------------------------------------------------------

    def _choices(self, method: str) -> list[spread.Choice]:
        kinds = kinds_of(method)
        self._fit_all([k for k in dict.fromkeys([*kinds, *(KINDS[k].probe for k in kinds)]) if k not in self._fits])
        return choices(self.packed, {k: self.fits(k) for k in kinds}, {k: self.weights(k) for k in kinds})

    def with_density(self, method: str, density: float) -> Trial:
        """The setting that reads a given share, corrected until the kernels' count says so, and its damage."""
        options, governed = self._choices(method), governed_bytes(self.packed, kinds_of(method))
        limit = density * governed
        for number in range(4):
            picked = _densities(options, spread.within_bytes(options, limit))
            trial = self.trial(method, picked, 256, f"adjusting {method} ({number + 1})")
            if abs(trial.density - density) < 0.002:
                break
            limit *= density / max(trial.density, 1e-3)
        return self.trial(method, picked, self._scored(), f"measuring {method}")

    def with_budget(self, methods: Sequence[str], budget: float) -> list[Trial]:
        """For each method the setting that reads least and keeps the budget; those that have none are left out."""
        found = []
        for number, method in enumerate(methods, start=1):
            options = self._choices(method)

            def attempt(limit: float, method: str = method, number: int = number) -> tuple[Trial, float]:
                picked = _densities(options, spread.within_damage(options, limit))  # noqa: B023 (called at once)
                stage = f"trying {method} ({number} of {len(methods)})"
                trial = self.trial(method, picked, self._scored(), stage)
                return trial, trial.bound

            best = search(attempt, budget, math.log1p(budget))
            if best is not None:
                found.append(best)
        if not found:
            raise FewfireError(
                f"no setting of {', '.join(methods)} keeps perplexity within {100 * budget:g} % on this sample: "
                "allow more, or give more --text"
            )
        return found

    def fastest(self, trials: Sequence[Trial]) -> tuple[int, float]:
        """The number of the fastest trial, and how much faster than dense it decodes, measured side by side."""
        names = [repr((t.method, sorted(t.densities.items()))) for t in trials]
        key = "times " + hashlib.sha256("".join(names).encode()).hexdigest()[:16]

        def compute() -> list[float]:
            selected = [self.selection(t.method, t.densities) for t in trials]
            return timing.side_by_side(self.model, [None, *selected], self.held[0], self.progress)

        dense, *times = self.notebook.number(key, compute)
        best = int(np.argmin(times))
        return best, dense / times[best]


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


def _some(cut: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """About so many tokens of the windows, whole windows from all over the text as far as possible."""
    size = max(len(window) for window in cut)
    if tokens < size:
        return [cut[len(cut) // 2][:tokens]]
    count = min(len(cut), tokens // size)
    return [cut[i * len(cut) // count] for i in range(count)]


def _density_for(fit: Fit, error: float) -> float:
    """The density at which a layer loses so much, in the range that was fitted."""
    found = float(np.interp(-error, -fit["errors"], fit["densities"]))
    return min(max(found, float(fit["densities"][0])), 0.95)


def _densities(options: Sequence[spread.Choice], picked: Sequence[int]) -> dict[str, list[float]]:
    """Densities by kind and layer."""
    settings: list[Any] = [choice.settings[i] for choice, i in zip(options, picked, strict=True)]
    return {kind: [setting[kind] for setting in settings] for kind in settings[0]}
