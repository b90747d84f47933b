"""What the selection in use does to the predictions: next-token distributions beside the dense model's.

Both decode the same windows token by token, so that nothing differs but the selection, and their differences scatter
far less than the perplexities. The dense model decodes once; what is kept of it are its most probable tokens,
which makes the KL divergence one over these and all others taken together: never more than the whole one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fewfire.progress import Progress, silent

if TYPE_CHECKING:
    from fewfire.model import Model

_KEPT = 1024  # most probable tokens
_BLOCK = 16  # neighbouring tokens, whose differences may depend on each other, in one piece

Windows = Sequence[Sequence[int]]  # of at least two tokens, each read from an empty cache; all but the first are scored


@dataclass(frozen=True, eq=False)
class Dense:
    """What the dense model predicts for T scored tokens."""

    tokens: np.ndarray  # (T, kept) int32 the most probable next tokens, the most probable one first
    log_p: np.ndarray  # (T, kept) float32 their log probabilities
    target: np.ndarray  # (T,) float32 that of the token that came


@dataclass(frozen=True, eq=False)
class Damage:
    """Of a selection, over T scored tokens."""

    grown: np.ndarray  # (T,) float64 how much more -log p of the token that came is, in nats
    kl: np.ndarray  # (T,) float64 KL(dense || selected) of the distribution that it came from, in nats
    agree: np.ndarray  # (T,) bool whether both have the same most probable token
    bytes_per_token: float  # of weights

    @property
    def growth(self) -> float:
        """Of the perplexity: 0.01 is 1 %."""
        return math.expm1(self.grown.mean())

    @property
    def error(self) -> float:
        """Standard error of `growth`."""
        count = len(self.grown) // _BLOCK
        if count < 2:
            return math.inf
        means = self.grown[: count * _BLOCK].reshape(count, _BLOCK).mean(axis=1)
        return (1 + self.growth) * float(means.std(ddof=1)) / math.sqrt(count)


def observe_dense(model: Model, windows: Windows, progress: Progress = silent, stage: str = "measuring dense") -> Dense:
    """What the model predicts with the engine's present selection, which should be none."""
    tokens, log_p, targets = [], [], []
    for target, logits in _decoded(model, windows, progress, stage):
        shift = log_total(logits)
        kept = min(_KEPT, len(logits))
        best = np.argpartition(logits, len(logits) - kept)[len(logits) - kept :]
        best = best[np.argsort(-logits[best], kind="stable")].astype(np.int32)
        tokens.append(best)
        log_p.append(logits[best] - shift)
        targets.append(logits[target] - shift)
    return Dense(np.stack(tokens), np.stack(log_p), np.array(targets, np.float32))


def measure(
    model: Model, windows: Windows, dense: Dense, progress: Progress = silent, stage: str = "measuring"
) -> Damage:
    """The damage that the engine's present selection does, given what the dense model says about the same windows."""
    count, read = len(dense.target), 0
    grown, kl, agree = np.empty(count), np.empty(count), np.empty(count, bool)
    for i, (target, logits) in enumerate(_decoded(model, windows, progress, stage)):
        shift = log_total(logits)
        kept = dense.log_p[i].astype(np.float64)
        found = logits[dense.tokens[i]].astype(np.float64) - shift
        p, q = np.exp(kept), np.exp(found)
        rest_p, rest_q = max(1 - p.sum(), 1e-9), max(1 - q.sum(), 1e-9)
        kl[i] = p @ (kept - found) + rest_p * math.log(rest_p / rest_q)
        grown[i] = dense.target[i] - (logits[target] - shift)
        agree[i] = logits.argmax() == dense.tokens[i, 0]
        read += model.engine.bytes_read()
    return Damage(grown, kl, agree, read / count)


def _decoded(model: Model, windows: Windows, progress: Progress, stage: str) -> Iterator[tuple[int, np.ndarray]]:
    """Each scored token with the logits that were to predict it, `(vocab,)` float32."""
    session, done, total = model.session(), 0, sum(len(window) - 1 for window in windows)
    for window in windows:
        session.rewind(0)
        for token, target in pairwise(window):
            yield target, session.feed([token])
            done += 1
            progress(stage, done, total)


def log_total(logits: np.ndarray) -> np.float32:
    """log sum exp of `(vocab,)` logits."""
    best = logits.max()
    return np.float32(best + np.log(np.exp(logits - best).sum(dtype=np.float64)))
