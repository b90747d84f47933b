"""Linear scores that say which neurons, or groups of them, are worth reading: what `lowrank` and `router` are made of.

Reading something is worth the damage that leaving it out would do, less a price, which is the same for all. A score
says whether that is positive, and is fitted to the logistic loss of it, weighted by the amount: so it minimises what
selection is about, the damage at a density, and its best cut is the same for all neurons. Deja Vu (2310.17157) and
LTE (2402.06126) fit to whether a neuron fires; damage, known exactly after the fact, loses a third less.

Plain arrays, float32, of one layer; T are tokens. Knows nothing of models and formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg

_RIDGE = 1e-3  # of the inputs' mean variance, added to each
_LARGEST = 100.0  # prices: no token may be worth more, or a few would decide
_STEPS = 8  # gradients: the loss hardly falls after six
_SHRINK = 0.2  # of what refinement changes, times features per token
_LEAST_LEFT = 0.01  # of a target's variance that is never known
_CHUNK = 256  # tokens at a time, so that what a step makes of them stays in the cache
_BLOCK = 64  # neighbouring tokens are alike: they are held out together
_HELD = 4  # one block of so many is held out


def held_out(tokens: int) -> np.ndarray:
    """Which tokens nothing is fitted to, bool `(tokens,)`: every fourth stretch of 64, of few tokens every fourth."""
    return np.arange(tokens) // (_BLOCK if tokens >= 4 * _HELD * _BLOCK else 1) % _HELD == _HELD - 1


def reduced_rank(inputs: np.ndarray, targets: np.ndarray, rank: int) -> np.ndarray:
    """The `rank` linear functions of inputs that predict targets best, `(rank, hidden)`: reduced-rank regression.

    inputs: `(T, hidden)`, targets: `(T, n)`; an intercept is understood. In closed form (Izenman 1975): of all B A
    with A `(rank, hidden)`, |targets - inputs A' B'|² is least for the A returned, up to a small ridge. The functions
    have variance 1, are not correlated, and come in the order of how much they explain.
    """
    x, count = inputs - inputs.mean(axis=0), np.float32(len(inputs))
    covariance = (x.T @ x / count).astype(np.float64)
    covariance[np.diag_indices_from(covariance)] += max(_RIDGE * np.trace(covariance) / len(covariance), 1e-30)
    root = np.linalg.cholesky(covariance)
    cross = x.T @ (targets - targets.mean(axis=0)) / count  # (hidden, n)
    cross = scipy.linalg.solve_triangular(root.astype(np.float32), cross, lower=True)
    hidden = len(root)
    _, vectors = scipy.linalg.eigh(cross @ cross.T, subset_by_index=[hidden - rank, hidden - 1])
    return scipy.linalg.solve_triangular(root.T, vectors[:, ::-1], lower=False).T.astype(np.float32)


def benefits(damage: np.ndarray, share: float) -> np.ndarray:
    """What reading is worth in units of the price, less the price, `(T, n)`: from -1 up to a limit.

    damage: `(T, n)` of leaving out, not negative. The price is such that a `share` of all is worth it; of what does
    any damage, if that is less.
    """
    sample = damage[:: -(-damage.size // 2**21)].reshape(-1)
    rank = min(int((1 - share) * sample.size), sample.size - 1)
    price = np.partition(sample, rank)[rank]
    return np.clip(damage / max(price, np.float32(1e-30)) - 1, -1, _LARGEST)


class Linear(NamedTuple):
    """Scores rows . features + bias."""

    rows: np.ndarray  # (n, features)
    bias: np.ndarray  # (n,)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return features @ self.rows.T + self.bias  # (T, n)


def constant(worth: np.ndarray, features: int) -> Linear:
    """The best scores that do not depend on the input; `worth`: `(T, n)` from `benefits`."""
    for_, against = np.maximum(worth, 0).mean(axis=0), np.maximum(-worth, 0).mean(axis=0)
    slack = np.float32(1e-3)
    return Linear(np.zeros((worth.shape[1], features), np.float32), np.log((for_ + slack) / (against + slack)))


def guessed(targets: np.ndarray, features: np.ndarray, worth: np.ndarray) -> Linear:
    """Scores from guesses of the targets: how probable it is that a target is over 0; constant ones where better.

    targets: `(T, n)`, what the gates see; features: `(T, f)` white, as for `refined`. What linear regression leaves
    over is taken to be normal, and 1.7 turns a normal distribution into a logistic one.
    """
    centred = targets - targets.mean(axis=0)
    rows = centred.T @ features / np.float32(len(features))
    variance = np.einsum("tn,tn->n", centred, centred) / np.float32(len(centred))
    left = np.maximum(variance - np.einsum("nf,nf->n", rows, rows), _LEAST_LEFT * variance + np.float32(1e-30))
    sharp = np.float32(1.7) / np.sqrt(left)
    guess, fixed = Linear(rows * sharp[:, None], targets.mean(axis=0) * sharp), constant(worth, features.shape[1])
    better = losses(guess, features, worth) < losses(fixed, features, worth)
    return Linear(np.where(better[:, None], guess.rows, fixed.rows), np.where(better, guess.bias, fixed.bias))


def losses(scores: Linear, features: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """Each neuron's logistic loss, `(n,)`: the mean of |worth| log(1 + exp(-sign(worth) score))."""
    return _loss_and_gradient(np.column_stack(scores), _with_one(features), worth)[0]


def refined(start: Linear, features: np.ndarray, worth: np.ndarray, steps: int = _STEPS) -> Linear:
    """Scores with a lower loss, none of them with a higher one.

    features: `(T, f)` of variance 1 and not correlated; then a quarter of the mean |worth| bounds the curvature about
    (Böhning 1992), and one step from constant scores is linear regression. Nesterov's accelerated gradients, all
    neurons at once in two matrix products a step; a neuron whose loss rises goes back and takes half the step.
    """
    inputs, count = _with_one(features), np.float32(len(features))
    shrink = np.full(inputs.shape[1], _SHRINK * features.shape[1] / count, np.float32)
    shrink[-1] = 0  # the bias is free
    weight = np.maximum(np.abs(worth).mean(axis=0), np.float32(1e-12))[:, None]
    step, speed = np.full_like(weight, 4), np.ones_like(weight)
    first = best = at = before = np.column_stack(start)
    best_loss, best_slope = np.full(len(at), np.inf, np.float32), np.zeros_like(at)
    for _ in range(steps):
        loss, slope = _loss_and_gradient(at, inputs, worth)
        loss = loss + (weight[:, 0] / 2) * (np.square(at - first) @ shrink)
        worse = (loss > best_loss)[:, None]
        best_loss = np.minimum(loss, best_loss)
        best = np.where(worse, best, at)
        best_slope = np.where(worse, best_slope, slope / weight + shrink * (at - first))
        step = np.where(worse, step / 2, step)
        new = best - step * best_slope
        faster = (1 + np.sqrt(1 + 4 * speed * speed)) / 2
        momentum = np.where(worse, 0, (speed - 1) / faster)
        at, before, speed = new + momentum * (new - before), new, np.where(worse, 1, faster)
    return Linear(np.ascontiguousarray(best[:, :-1]), best[:, -1].copy())


def _with_one(features: np.ndarray) -> np.ndarray:
    return np.column_stack([features, np.ones(len(features), np.float32)])


def _loss_and_gradient(rows: np.ndarray, inputs: np.ndarray, worth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each neuron, `(n,)`, and by its weights, `(n, f)`."""
    loss, slope = np.zeros(len(rows), np.float32), np.zeros_like(rows)
    for start in range(0, len(inputs), _CHUNK):
        x, value = inputs[start : start + _CHUNK], worth[start : start + _CHUNK]
        scores = x @ rows.T
        # log(1 + exp(-|score|)) overflows nowhere; the sigmoid comes out of the same exponential
        small = np.exp(-np.abs(scores))
        weight, wanted = np.abs(value), np.maximum(value, 0)
        loss += (weight * (np.log1p(small) + np.maximum(scores, 0)) - wanted * scores).sum(axis=0)
        sigmoid = np.where(scores > 0, np.float32(1), small) / (1 + small)
        slope += (weight * sigmoid - wanted).T @ x
    count = np.float32(len(inputs))
    return loss / count, slope / count


def cuts(scores: np.ndarray, densities: Sequence[float]) -> np.ndarray:
    """What scores `(T, n)` must be over so that a share is, `(densities,)`; at density 1 just under the least."""
    flat = scores.reshape(-1)
    ranks = [flat.size - round(density * flat.size) - 1 for density in densities]  # the largest that is dropped
    ordered = np.partition(flat, sorted({rank for rank in ranks if rank >= 0} or {0}))
    least = np.nextafter(flat.min(), np.float32(-np.inf))
    return np.array([ordered[rank] if rank >= 0 else least for rank in ranks], np.float32)
