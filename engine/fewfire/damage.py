"""What the selection in use does to the predictions: next-token distributions beside the dense model's.

Both decode the same windows token by token, so that nothing differs but the selection, and their differences scatter
far less than the perplexities. Dense is what runs without a selection: a ReLU's zeros are not read, which changes
nothing but the order of sums (perf/LOG.md, "thresholds and the order of sums"). It decodes once; what is kept of it
are its most probable tokens, and some that stand for the rest of the probability: a screened head does its damage
there, and keeps the sum, so that the rest taken as one would show none of it (perf/LOG.md, "where a screen's damage
is"). Neighbouring tokens are alike, so standard errors take windows, not tokens, as independent of each other.
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

_KEPT = 512  # most probable tokens, and as many for the rest
LARGEST = 700.0  # whose exp is still a float
NOT_FINITE = "the model computed no finite number for this text: its weights may be damaged"

Windows = Sequence[Sequence[int]]  # of at least two tokens, each read from an empty cache; all but the first are scored


@dataclass(frozen=True, eq=False)
class Dense:
    """What the dense model predicts for T scored tokens."""

    tokens: np.ndarray  # (T, kept) int32 next tokens, the most probable one first
    log_p: np.ndarray  # (T, kept) float32 their log probabilities
    weight: np.ndarray  # (T, kept) float32 the probability that they stand for: together 1
    target: np.ndarray  # (T,) float64 that of the token that came
    seconds: np.ndarray  # (T,) float64 that decoding took
    read: np.ndarray  # (T,) int64 bytes of weights that decoding read


@dataclass(frozen=True, eq=False)
class Damage:
    """Of a selection, over T scored tokens. Standard errors are infinite where there is only one window."""

    grown: np.ndarray  # (T,) float64 how much more -log p of the token that came is, in nats
    kl: np.ndarray  # (T,) float64 KL(dense || selected) of the distribution that it came from, in nats, estimated
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

    @property
    def worse_kl(self) -> float:
        """Mean KL in those half of the windows that have most of it: what text may have that is harder than this."""
        sums, counts = self._by_window(self.kl)
        worse = np.argsort(-sums / counts, kind="stable")[: (len(sums) + 1) // 2]
        return float(sums[worse].sum() / counts[worse].sum())

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
    tokens, log_p, weights, targets, seconds, read = [], [], [], [], [], []
    for target, logits, took, bytes_read in _decoded(model, windows, progress, stage):
        total = float(log_total(logits))
        kept, weight = _kept(logits, total)
        tokens.append(kept)
        log_p.append(_log_p(logits[kept], total))
        weights.append(weight)
        targets.append(float(logits[target]) - total)
        seconds.append(took)
        read.append(bytes_read)
    stacked = np.stack(tokens), np.stack(log_p), np.stack(weights)
    return Dense(*stacked, np.array(targets), np.array(seconds), np.array(read))


def measure(
    model: Model, windows: Windows, dense: Dense, progress: Progress = silent, stage: str = "measuring"
) -> Damage:
    """The damage that the engine's present selection does, given what the dense model says about the same windows.

    Raises `FewfireError` if the logits are not finite.
    """
    count, read = len(dense.target), 0
    grown, kl, seconds, agree = np.empty(count), np.empty(count), np.empty(count), np.empty(count, bool)
    for i, (target, logits, took, bytes_read) in enumerate(_decoded(model, windows, progress, stage)):
        total = float(log_total(logits))
        kl[i] = _divergence(dense.weight[i], dense.log_p[i], _log_p(logits[dense.tokens[i]], total))
        grown[i] = dense.target[i] - (float(logits[target]) - total)
        agree[i] = logits.argmax() == dense.tokens[i, 0]
        seconds[i] = took
        read += bytes_read
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


def _kept(logits: np.ndarray, total: float) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that are kept, and the probability that each stands for.

    All, or the most probable ones and a systematic sample of the others: in the order of their ids, those at every so
    many'th of their probability, some perhaps repeatedly (Cochran, Sampling Techniques, 8.1).
    """
    p = np.exp(logits - total, dtype=np.float64)
    some = _KEPT if len(logits) > 2 * _KEPT else len(logits)
    best = np.argpartition(-logits, some - 1)[:some]
    best = best[np.argsort(-logits[best], kind="stable")]
    if some == len(logits):
        return best.astype(np.int32), p[best].astype(np.float32)
    rest = p.copy()
    rest[best] = 0
    sums = rest.cumsum()
    drawn = np.searchsorted(sums, sums[-1] * (np.arange(_KEPT) + 0.5) / _KEPT)
    weight = np.append(p[best], np.full(_KEPT, sums[-1] / _KEPT))
    return np.append(best, drawn).astype(np.int32), weight.astype(np.float32)


def _divergence(weight: np.ndarray, log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q) from tokens that stand for so much of p.

    It may come out under 0 for a single token, but not on average: also where q has moved to tokens that are rare in p.
    """
    return float(weight.astype(np.float64) @ (log_p.astype(np.float64) - log_q))


def _decoded(
    model: Model, windows: Windows, progress: Progress, stage: str
) -> Iterator[tuple[int, np.ndarray, float, int]]:
    """Each scored token, the logits `(vocab,)` that were to predict it, the seconds and bytes of weights they took."""
    session, done, total = model.session(), 0, sum(len(window) - 1 for window in windows)
    for window in windows:
        session.rewind(0)
        for token, target in pairwise(window):
            start = time.perf_counter()
            logits = session.feed([token])
            took = time.perf_counter() - start
            if not np.isfinite(logits).all():
                raise FewfireError(NOT_FINITE)
            yield target, logits, took, session.bytes_read
            done += 1
            progress(stage, done, total)
