"""Measures of how few neurons matter, on plain arrays: `(T, neurons)` activations or masks of T tokens in order.

Windows are lengths of consecutive runs of tokens; no measure looks from one window into the next. Knows nothing of
models: `analyze.py` takes these measures of every layer, and a test can say by hand what they should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

POSITION_EDGES = (0, 1, 8, 32, 128, 512, 2048, 8192, 32768)


def small_share(fired: np.ndarray, of_largest: float) -> float:
    """Share of activations whose absolute value is under a share of the largest of the token's."""
    size = np.abs(fired)
    return float((size < of_largest * size.max(axis=1, keepdims=True)).mean())


def magnitudes(fired: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of all activations in each bin of log10(abs(h) / the token's largest), `(len(edges) - 1,)`.

    Zeros are in no bin; what is under the first edge counts for the first bin.
    """
    size = np.abs(fired)
    largest = np.broadcast_to(size.max(axis=1, keepdims=True), size.shape)
    ratio = np.log10(size[size > 0] / largest[size > 0])
    return np.histogram(np.clip(ratio, edges[0], edges[-1]), edges)[0] / fired.size


class Ranks:
    """The energies of each token's neurons (any non-negative share of what the layer does), from the largest down."""

    def __init__(self, energy: np.ndarray) -> None:
        self._energy = energy
        self._sorted = -np.sort(-energy, axis=1)
        self._sums = np.cumsum(self._sorted, axis=1, dtype=np.float64)

    def holders(self, share: float) -> np.ndarray:
        """How many neurons it takes to hold a share of each token's energy, `(T,)`; none if there is no energy."""
        total = self._sums[:, -1:]
        enough = 1 + (self._sums < share * total).sum(axis=1)
        return np.where(total[:, 0] > 0, np.minimum(enough, self._energy.shape[1]), 0)

    def holding(self, share: float) -> np.ndarray:
        """The neurons that hold a share of each token's energy: a mask `(T, neurons)`."""
        count = self.holders(share)
        least = self._sorted[np.arange(len(count)), np.maximum(count, 1) - 1]
        return (self._energy >= least[:, None]) & (count > 0)[:, None]

    def curve(self, points: int) -> np.ndarray:
        """Share of the energy that the best 0, 1, ... all of `points` equal parts of the neurons hold, `(points + 1,)`.

        The mean over the tokens that have any energy.
        """
        total = self._sums[:, -1]
        sums = self._sums[total > 0] / total[total > 0, None]
        if not len(sums):
            return np.zeros(points + 1)
        neurons = self._energy.shape[1]
        return np.interp(np.linspace(0, neurons, points + 1), np.arange(neurons + 1), [0.0, *sums.mean(axis=0)])


class Overlap(NamedTuple):
    """What consecutive tokens' active sets share, all pairs of tokens together."""

    kept: float  # of the neurons that are active, the share that was so for the token before
    jaccard: float  # of the neurons that are active for either of two tokens, the share that is so for both


def overlap(active: np.ndarray, windows: Sequence[int]) -> Overlap:
    """How much of a mask stays from each token to the next; 0 where nothing is active.

    By chance, with a share d active, it would be d that is kept, and d / (2 - d) of either.
    """
    follows = np.ones(len(active), bool)
    follows[np.cumsum([0, *windows[:-1]])] = False
    now, before = active[follows], active[:-1][follows[1:]]
    both, either = int((now & before).sum()), int((now | before).sum())
    return Overlap(both / max(1, int(now.sum())), both / max(1, either))


def aggregated(active: np.ndarray, windows: Sequence[int]) -> dict[int, float]:
    """Share of neurons that any of t tokens in a row activates, for t = 1, 2, 4, ... up to the longest window.

    The mean over the runs of t tokens that fit into the windows without overlapping; 1 minus it is the aggregated
    sparsity of ReLU Strikes Back (2310.04564, section 5.1). By chance it would be `random_union`.
    """
    unions = np.split(active, np.cumsum(windows)[:-1])
    shares, t = {}, 1
    while unions := [union for union in unions if len(union)]:
        shares[t] = float(sum(union.sum() for union in unions) / (sum(map(len, unions)) * active.shape[1]))
        unions = [union[: len(union) // 2 * 2 : 2] | union[1::2] for union in unions]
        t *= 2
    return shares


def random_union(density: float, t: int) -> float:
    """What `aggregated` would find if every token drew its neurons at random: 1 - s^t for a sparsity of s."""
    return 1 - (1 - density) ** t


def position_label(bucket: int) -> str:
    """Which positions in a window the bucket of that number in `by_position` has: "0", "8-31"."""
    first, last = POSITION_EDGES[bucket], POSITION_EDGES[bucket + 1] - 1
    return str(first) if first == last else f"{first}-{last}"


def by_position(active: np.ndarray, windows: Sequence[int]) -> dict[str, float]:
    """Share of neurons that are active, by the tokens' position in their window; only what occurs."""
    position = np.concatenate([np.arange(length) for length in windows])
    bucket = np.searchsorted(POSITION_EDGES, position, side="right") - 1
    share = active.mean(axis=1)
    return {position_label(each): float(share[bucket == each].mean()) for each in np.unique(bucket)}


class Quality(NamedTuple):
    """How well a predictor guesses a layer's active neurons."""

    recall: float  # of the neurons that the exact computation keeps, the share that is predicted
    precision: float  # of the neurons that are predicted, the share that the exact computation keeps
    density: float  # share of the neurons that are predicted


def predictor_quality(exact: np.ndarray, predicted: np.ndarray) -> Quality:
    """Recall, precision and density of predicted masks against exact ones, `(T, neurons)`, all tokens together.

    1 where there is nothing to find, or nothing was predicted.
    """
    hits, wanted, found = int((exact & predicted).sum()), int(exact.sum()), int(predicted.sum())
    return Quality(hits / wanted if wanted else 1.0, hits / found if found else 1.0, found / predicted.size)
