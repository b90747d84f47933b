"""A calibration at work: a model, a sample that is divided, and what was fitted to it, kept in a notebook.

Most of the sample is observed (`observe.py`), and for every layer the kinds of a method are fitted
(`selectors/methods.py`): that says which share of a layer's output is lost at which density. `probes.py` measures what
such a loss means to the predictions, and `choosing.py` spreads a density over the parts of the model with these. The
rest of the sample, which nothing was fitted to, says what it costs in the end (`trials.py`). `calibrate.py` puts them
together.

Promises that a killed calibration, made again, goes on where it stopped and comes to the same result. Uses the engine
alone, and changes what it selects: it is to be borrowed meanwhile (`Engine.borrowed`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fewfire import damage, memory
from fewfire.damage import Dense
from fewfire.notebook import Notebook
from fewfire.observe import Observation
from fewfire.progress import Progress, silent
from fewfire.revision import revision
from fewfire.selectors import store
from fewfire.selectors.fits import Fit
from fewfire.selectors.methods import KINDS, parse, selection
from fewfire.selectors.parts import flatten, unflatten
from fewfire.selectors.selection import Selection
from fewfire.windows import some, windows

if TYPE_CHECKING:
    from fewfire.model import Model

_WINDOW = 256
_HELD = 0.25  # share of the sample that nothing is fitted to
_FITTED = 8192  # tokens that are observed, fewer where they would take more than so many bytes in one layer
_OBSERVED_BYTES = 2**29
WORK = 1.2e12  # bytes of weights that the probes of one kind, or a trial, may read
_LEAST = 512  # tokens that a sample must have
_PIECES = 8  # windows that there must be at least

Densities = dict[str, list[float]]  # by kind and layer; of the head there is one


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

    def dense(self, name: str, cut: list[list[int]]) -> Dense:
        """What the model says about windows without a selection.

        A ReLU's zeros are left out: where thresholds decide, sums in another order would decide a few of them
        differently, and what comes of that is no damage (perf/LOG.md, "thresholds and the order of sums").
        """
        if name not in self._said:
            found = self.notebook.arrays(name)
            if found is None:
                self.model.engine.select(None, progress=self.progress)
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

    def selection(self, method: str, densities: Densities) -> Selection:
        """The selection of a method at densities by kind and layer."""
        return selection(self.packed, parse(method), {kind: self.fits(kind) for kind in densities}, densities)

    def as_loaded(self, method: str, densities: Densities) -> Selection:
        """The same in memory such as it will be loaded into: what is timed elsewhere takes longer."""
        arrays, numbers = flatten(self.selection(method, densities))
        return unflatten(memory.together(arrays), numbers)
