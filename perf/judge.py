"""Texts on which models are judged beside their original: what they predict there, and what they read for that."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fewfire
from fewfire import damage
from fewfire.damage import Dense
from fewfire.windows import windows
from perf.peers import Request
from perf.spread import rounded
from perf.status import progress, say
from perf.texts import part_of

_WINDOW = 512


@dataclass(frozen=True, eq=False)
class Text:
    """A text, its windows of tokens, and what the original predicts for them."""

    label: str
    content: str
    windows: list[list[int]]
    dense: Dense

    def about(self) -> dict[str, Any]:
        """For a result."""
        digest = hashlib.sha256(repr(self.windows).encode()).hexdigest()[:16]
        perplexity = rounded(math.exp(-float(self.dense.target.mean())))
        return {"label": self.label, "scored": len(self.dense.target), "digest": digest, "perplexity": perplexity}


class _Counter:
    """Adds up what the kernels count: `damage.measure` tells of every token when it has been decoded."""

    def __init__(self, model: fewfire.Model) -> None:
        self._model, self._tokens, self._rows = model, 0, np.zeros(3)

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._rows += self._model.engine.neurons_read().mean(axis=0)
        self._tokens += 1
        progress(stage, done, total)

    def shares(self) -> dict[str, float]:
        """Of all neurons, those whose gate, up and down rows a token read, on average."""
        found = self._rows / self._tokens / self._model.config.intermediate_size
        return {name: rounded(float(share)) for name, share in zip(("gate", "up", "down"), found, strict=True)}


class Judge:
    """The original with nothing left out, and the texts.

    source: as for `fewfire.load`, or what `perf.synthetic` makes; texts: files, or shares of their characters
    (FILE@0.8:1.0), at most so many `tokens` of each; threads: that all decode with.
    """

    def __init__(self, source: str, weights: str, threads: int, texts: Sequence[str], tokens: int) -> None:
        request = Request(source, threads, 0)
        self.source, self.label, self._tokens = source, request.label(), tokens
        self.model = fewfire.load(request.loadable(weights), weights=weights, threads=threads, dense=True)
        self.window = min(_WINDOW, self.model.context)
        self.texts: list[Text] = []
        for text in texts:
            label, content = _read(text)
            cut = self._cut(self.model, content)
            dense = damage.observe_dense(self.model, cut, progress, f"{self.label} reads {label}")
            self.texts.append(Text(label, content, cut, dense))

    def _cut(self, model: fewfire.Model, content: str) -> list[list[int]]:
        return windows(model.tokenizer, model.config, content, self.window, self._tokens)

    def open(self, source: str) -> fewfire.Model:
        """A model to be judged, from a source like the original's.

        Raises `ValueError` for one of other tokens or of another number format.
        """
        weights, threads = self.model.weights, self.model.engine.threads
        model = fewfire.load(Request(source, threads, 0).loadable(weights), weights=weights, threads=threads)
        if model.weights != weights:
            raise ValueError(f"{source} is packed as {model.weights}, not {weights}: pass --weights")
        if any(self._cut(model, text.content) != text.windows for text in self.texts):
            raise ValueError(f"{source} has other tokens than {self.source}, so they cannot be compared")
        return model

    def row(self, model: fewfire.Model) -> dict[str, Any]:
        """What leaving out costs a model on each text, and what it reads on average over all of them."""
        counter, found, read = _Counter(model), [], []
        for text in self.texts:
            did = damage.measure(model, text.windows, text.dense, counter, f"{model.packed.name} reads {text.label}")
            nll = float(did.grown.mean()) - float(text.dense.target.mean())
            read.append(did.bytes_per_token)
            found.append(
                {
                    "perplexity": rounded(math.exp(min(nll, damage.LARGEST))),
                    "growth_percent": rounded(100 * did.growth),
                    "error_percent": rounded(100 * did.error) if math.isfinite(did.error) else None,
                    "kl": rounded(float(did.kl.mean())),
                    "agreement": rounded(float(did.agree.mean())),
                }
            )
        say("")
        return {
            "method": model.engine.method,
            "rows_read": counter.shares(),
            "megabytes_per_token": rounded(sum(read) / len(read) / 1e6),
            "texts": found,
        }


def _read(text: str) -> tuple[str, str]:
    """The label and content of FILE or FILE@0.8:1.0."""
    path, _, part = text.partition("@")
    content = Path(path).read_text(encoding="utf-8")
    return (f"{Path(path).name} ({part})", part_of(content, part)) if part else (Path(path).name, content)
