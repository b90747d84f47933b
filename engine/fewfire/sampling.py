"""From the logits of one position to the next token.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p (llama.cpp filters
first and divides by the temperature last, so the same top-p may keep more there). A vocabulary has up to
262,144 entries and a small model computes a token in a few milliseconds, so nothing here sorts a whole
vocabulary when a partial selection will do. Knows nothing of models or text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from fewfire.errors import FewfireError

_GREEDY_BELOW = 1e-6  # so cold only ties with the best could be drawn, and float32 would overflow
_FIRST_GUESS = 256  # candidates that top-p looks at first; at usual settings they are enough
_BLOCK = 512  # weights per sum when drawing


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token; the defaults are greedy. `ValueError` when made with a bad value."""

    temperature: float = 0.0  # 0: always the most probable token
    top_k: int = 0  # keep the k most probable; 0: all
    top_p: float = 1.0  # keep the fewest most probable that have this much probability together
    min_p: float = 0.0  # keep those at least this probable relative to the best one
    repetition_penalty: float = 1.0  # CTRL (1909.05858): over 1 makes tokens that were generated less likely
    seed: int | None = None  # the same seed gives the same text; None: different every time

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, low=0.0)
        _check_int("top_k", self.top_k)
        _check_real("top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        _check_real("min_p", self.min_p, low=0.0, high=1.0)
        _check_real("repetition_penalty", self.repetition_penalty, low=0.0, low_open=True)
        if self.seed is not None:
            _check_int("seed", self.seed)

    @property
    def greedy(self) -> bool:
        """Whether chance plays no part."""
        return self.temperature < _GREEDY_BELOW


class Sampler:
    """Draws tokens for one generation; its random numbers depend on the seed alone. One thread at a time."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)

    def pick(self, logits: np.ndarray, generated: Sequence[int] = ()) -> int:
        """The next token id, given `(vocab,)` logits and the tokens that were generated so far, without the prompt.

        An answer needs the question's words (perf/LOG.md, "a repetition penalty on the answer alone").
        """
        logits = penalised(logits, generated, self.sampling.repetition_penalty)
        if self.sampling.greedy:
            best = int(np.argmax(logits))
            _check_finite(logits[best])
            return best
        ids, weights = candidates(logits, self.sampling)
        return int(ids[_draw(weights, self._rng.random())])


def penalised(logits: np.ndarray, generated: Sequence[int], penalty: float) -> np.ndarray:
    """The logits after the repetition penalty: a copy, but the same array where it changes nothing."""
    if penalty == 1.0 or not len(generated):
        return logits
    seen = np.asarray(generated, dtype=np.int64)  # repeats do no harm: each writes the same value
    scores = logits[seen]
    out = logits.copy()
    out[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
    return out


def candidates(logits: np.ndarray, s: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Ids that pass every filter, and their probabilities up to a common factor. Not for greedy sampling."""
    best = logits.max()
    _check_finite(best)
    ids = largest(logits, s.top_k) if 0 < s.top_k < len(logits) else np.arange(len(logits))
    kept = logits[ids] if len(ids) < len(logits) else logits
    weights = np.exp((kept - best) / np.float32(s.temperature))  # the best token's is 1
    if s.top_p < 1.0:
        at = _nucleus(weights, s.top_p)
        ids, weights = ids[at], weights[at]
    if s.min_p > 0.0:
        at = np.flatnonzero(weights >= s.min_p)
        ids, weights = ids[at], weights[at]
    return ids, weights


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """The indices of the k largest values, in no particular order."""
    n = len(values)
    groups = 16 * k
    if groups * 4 > n:
        return np.argpartition(values, n - k)[n - k :]
    # The k-th largest of the maxima of disjoint groups is reached by at least k values, so whatever is
    # smaller is out. Maxima and the comparison are vector code; only the few that are left meet the
    # partition.
    rows = n // groups
    maxima = values[: rows * groups].reshape(rows, groups).max(axis=0)
    bound = np.partition(maxima, groups - k)[groups - k]
    candidates = np.flatnonzero(values >= bound)
    return candidates[np.argpartition(values[candidates], len(candidates) - k)[len(candidates) - k :]]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the fewest largest weights whose sum reaches `top_p` of the total; at least one."""
    target = top_p * float(weights.sum(dtype=np.float64))
    k = min(_FIRST_GUESS, len(weights))
    while True:
        at = largest(weights, k) if k < len(weights) else np.arange(len(weights))
        at = at[np.argsort(-weights[at], kind="stable")]
        mass = np.cumsum(weights[at], dtype=np.float64)
        if mass[-1] >= target or k == len(weights):
            return at[: int(np.searchsorted(mass, target)) + 1]
        k = min(8 * k, len(weights))


def _draw(weights: np.ndarray, u: float) -> int:
    """An index with probability proportional to its weight, for `u` uniform in [0, 1).

    In two levels, because one running sum over a vocabulary takes longer than its softmax.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)).astype(np.float64)
    edges = np.cumsum(sums)
    target = u * edges[-1]
    block = _first_over(edges, target)
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    return block * _BLOCK + _first_over(inside, target - (edges[block] - sums[block]))


def _first_over(edges: np.ndarray, target: float) -> int:
    """The interval that holds the target; where rounding put it past the end, the last that is not empty."""
    at = int(np.searchsorted(edges, target, side="right"))
    return at if at < len(edges) else int(np.searchsorted(edges, edges[-1]))


def _check_finite(value: Any) -> None:
    if not math.isfinite(value):
        raise FewfireError("the model computed no finite number for the next token: its weights may be damaged")


def _check_real(name: str, value: Any, *, low: float, high: float = math.inf, low_open: bool = False) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and math.isfinite(value) and (low < value or (value == low and not low_open)) and value <= high:
        return
    if high < math.inf:
        bounds = f"over {low:g} and up to {high:g}" if low_open else f"from {low:g} to {high:g}"
    else:
        bounds = f"over {low:g}" if low_open else f"from {low:g} up"
    raise ValueError(f"{name} must be a number {bounds}, not {value!r}")


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise ValueError(f"{name} must be a whole number, 0 or more, not {value!r}")
