"""What the selection in use costs: next-token distributions of decoding with it, beside the dense model's.

The dense logits come from reading a window as a prompt, which leaves nothing out, and the others from reading it token
by token. Both see the same tokens, so their differences scatter far less than the perplexities themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fewfire.progress import Progress, silent

if TYPE_CHECKING:
    from fewfire.model import Model

_PART = 64  # tokens of a window whose dense logits are in memory
_BLOCK = 16  # neighbouring tokens, whose differences may depend on each other, in one piece


@dataclass(frozen=True, eq=False)
class Damage:
    """Per scored token: how much -log p of it grew, and the divergence of the distribution that it came from."""

    grown: np.ndarray  # (T,) float64, nats
    kl: np.ndarray  # (T,) float64, KL(dense || selected), nats
    agree: np.ndarray  # (T,) bool: the same most probable token
    bytes_per_token: float  # of weights, read in decoding

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
        return math.exp(self.grown.mean()) * float(means.std(ddof=1)) / math.sqrt(count)


def measure(
    model: Model, windows: Sequence[Sequence[int]], progress: Progress = silent, stage: str = "measuring"
) -> Damage:
    """The damage that the engine's present selection does to windows of at least 2 tokens, each from an empty cache."""
    total, done, read = sum(len(window) - 1 for window in windows), 0, 0
    grown, kl, agree = np.empty(total), np.empty(total), np.empty(total, bool)
    dense, selected = model.session(), model.session()
    for window in windows:
        dense.rewind(0)
        selected.rewind(0)
        for start, stop in _parts(len(window)):
            # Reading one token alone would be decoding; the last part has a token that is not scored.
            expected = log_softmax(dense.feed(window[start:stop], all_logits=True))
            for row, at in zip(expected, range(start, min(stop, len(window) - 1)), strict=False):
                found = log_softmax(selected.feed(window[at : at + 1]))
                read += bytes_read(model)
                target = window[at + 1]
                grown[done] = row[target] - found[target]
                kl[done] = np.dot(np.exp(row), row - found)
                agree[done] = row.argmax() == found.argmax()
                done += 1
                progress(stage, done, total)
    return Damage(grown, kl, agree, read / total)


def bytes_read(model: Model) -> int:
    """Weight bytes that the last decoded token read."""
    return model.engine.read()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def _parts(length: int) -> list[tuple[int, int]]:
    """Ranges of at most `_PART` + 1 tokens, none of a single one unless that is all."""
    starts = list(range(0, length, _PART))
    if length % _PART == 1 and len(starts) > 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], length], strict=True))
