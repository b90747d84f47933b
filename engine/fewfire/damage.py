"""What the selection in use does to the predictions: next-token distributions beside the dense model's.

Both decode the same windows token by token, so that nothing differs but the selection, and their differences scatter
far less than the perplexities. The dense model decodes once; what is kept of it are its most probable tokens, which
makes the KL divergence one over these and all others taken together: never more than the whole one, and the whole one
where the vocabulary is no larger. Neighbouring tokens are alike, so standard errors take windows, not tokens, as
independent of each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fewfire.errors import FewfireError
from fewfire.progress import Progress, silent

if TYPE_CHECKING:
    from fewfire.model import Model

_KEPT = 1024  # most probable tokens
LARGEST = 700.0  # whose exp is still a float
NOT_FINITE = "the model computed no finite number for this text: its weights may be damaged"

Windows = Sequence[Sequence[int]]  # of at least two tokens, each read from an empty cache; all but the first are scored


@dataclass(frozen=True, eq=False)
class Dense:
    """What the dense model predicts for T scored tokens."""

    tokens: np.ndarray  # (T, kept) int32 the most probable next tokens, the most probable one first
    log_p: np.ndarray  # (T, kept) float32 their log probabilities
    target: np.ndarray  # (T,) float64 that of the token that came
    seconds: np.ndarray  # (T,) float64 that decoding took


@dataclass(frozen=True, eq=False)
class Damage:
    """Of a selection, over T scored tokens. Standard errors are infinite where there is only one window."""

    grown: np.ndarray  # (T,) float64 how much more -log p of the token that came is, in nats
    kl: np.ndarray  # (T,) float64 KL(dense || selected) of the distribution that it came from, in nats
    agree: np.ndarray  # (T,) bool whether both have the same most probable token
    window: np.ndarray  # (T,) int32 the number of its window
    seconds: np.ndarray  # (T,) float64 that decoding took
    bytes_per_token: float  # of weights

    @property
    def growth(self) -> float:
        """Of the perplexity: 0.01 is 1 %."""
        return perplexity_growth(*self._by_window(self.grown))[0]

    @property
    def error(self) -> float:
        """Standard error of `growth`."""
        return perplexity_growth(*self._by_window(self.grown))[1]

    def error_of(self, values: np.ndarray) -> float:
        """Standard error of the mean of one of these arrays."""
        return clustered_error(*self._by_window(values))

    def _by_window(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums over each window, and how many tokens there are."""
        return np.bincount(self.window, values), np.bincount(self.window)


def observe_dense(model: Model, windows: Windows, progress: Progress = silent, stage: str = "measuring dense") -> Dense:
    """What the model predicts with the engine's present selection, which should be none.

    Raises `FewfireError` if the logits are not finite.
    """
    tokens, log_p, targets, seconds = [], [], [], []
    for target, logits, took in _decoded(model, windows, progress, stage):
        total = float(log_total(logits))
        kept = min(_KEPT, len(logits))
        best = np.argpartition(logits, len(logits) - kept)[len(logits) - kept :]
        best = best[np.argsort(-logits[best], kind="stable")].astype(np.int32)
        tokens.append(best)
        log_p.append(_log_p(logits[best], total))
        targets.append(float(logits[target]) - total)
        seconds.append(took)
    return Dense(np.stack(tokens), np.stack(log_p), np.array(targets), np.array(seconds))


def measure(
    model: Model, windows: Windows, dense: Dense, progress: Progress = silent, stage: str = "measuring"
) -> Damage:
    """The damage that the engine's present selection does, given what the dense model says about the same windows.

    Raises `FewfireError` if the logits are not finite.
    """
    count, read = len(dense.target), 0
    grown, kl, seconds, agree = np.empty(count), np.empty(count), np.empty(count), np.empty(count, bool)
    for i, (target, logits, took) in enumerate(_decoded(model, windows, progress, stage)):
        total = float(log_total(logits))
        kl[i] = _divergence(dense.log_p[i], _log_p(logits[dense.tokens[i]], total), len(logits))
        grown[i] = dense.target[i] - (float(logits[target]) - total)
        agree[i] = logits.argmax() == dense.tokens[i, 0]
        seconds[i] = took
        read += model.engine.bytes_read()
    window = np.repeat(np.arange(len(windows), dtype=np.int32), [len(each) - 1 for each in windows])
    return Damage(grown, kl, agree, window, seconds, read / count)


def clustered_error(sums: np.ndarray, counts: np.ndarray) -> float:
    """Standard error of a mean over tokens, of which those in a window depend on each other; infinite for one window.

    sums: of the values in each window, `(windows,)`; counts: how many there are. That of a ratio of two sums, to first
    order (Cochran, Sampling Techniques, 6.4).
    """
    n = len(counts)
    if n < 2:
        return math.inf
    apart = sums - counts * (sums.sum() / counts.sum())
    return math.sqrt(float(apart @ apart) * n / (n - 1)) / float(counts.sum())


def perplexity_growth(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """By what share a perplexity grows, and that figure's standard error.

    sums: how much more -log p is in each window, `(windows,)`, in nats; counts: the tokens scored in each.
    """
    growth = math.expm1(min(float(sums.sum() / counts.sum()), LARGEST))
    return growth, (1 + growth) * clustered_error(sums, counts)


def log_total(logits: np.ndarray) -> np.ndarray:
    """log sum exp of `(..., vocab)` logits, `(...)` float64."""
    best = logits.max(axis=-1, keepdims=True)
    return best[..., 0] + np.log(np.exp(logits - best).sum(axis=-1, dtype=np.float64))


def _log_p(logits: np.ndarray, total: float) -> np.ndarray:
    """Log probabilities as they are kept: rounded on both sides alike, so that what is the same has no divergence."""
    return (logits.astype(np.float64) - total).astype(np.float32)


def _divergence(log_p: np.ndarray, log_q: np.ndarray, vocab: int) -> float:
    """KL(p || q) of the listed tokens, with all others of the vocabulary as one more."""
    log_p, log_q = log_p.astype(np.float64), log_q.astype(np.float64)
    p, q = np.exp(log_p), np.exp(log_q)
    found = float(p @ (log_p - log_q))
    if len(p) < vocab:
        rest_p, rest_q = max(1 - p.sum(), 1e-9), max(1 - q.sum(), 1e-9)
        found += rest_p * math.log(rest_p / rest_q)
    return found


def _decoded(model: Model, windows: Windows, progress: Progress, stage: str) -> Iterator[tuple[int, np.ndarray, float]]:
    """Each scored token with the logits that were to predict it, `(vocab,)` float32, and the seconds that they took."""
    session, done, total = model.session(), 0, sum(len(window) - 1 for window in windows)
    for window in windows:
        session.rewind(0)
        for token, target in pairwise(window):
            start = time.perf_counter()
            logits = session.feed([token])
            took = time.perf_counter() - start
            if not np.isfinite(logits).all():
                raise FewfireError(NOT_FINITE)
            yield target, logits, took
            done += 1
            progress(stage, done, total)
