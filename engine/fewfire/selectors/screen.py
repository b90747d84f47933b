"""Fitting a screen for the output head: the head at low rank, and what it costs to trust it by how far.

With C the covariance of the final hidden states x of sample text and m their mean, the screen is the matrix S of a
given rank with the least mean of |(W - S)(x - m)|² (reduced-rank regression in closed form, Izenman 1975): with any A
for which C = A Aᵀ, S = W A Q Qᵀ A⁻¹, where Q are the leading eigenvectors of Aᵀ Wᵀ W A. Its factors are W A Q and
Qᵀ A⁻¹, so that what lies between them has variance 1 and rounds well.

A token's bias is what S lacks at the mean, (w - s) m, and half the variance of what it lacks around it, because
E exp(s x + e) = exp(s x + var(e) / 2) for a normal e: without that, all the tokens that are not made exact would
together get too little probability. Works through the head block by block; knows nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import linalg, special

from fewfire import quantize
from fewfire.observe import Observation, head_rows
from fewfire.pack import fit_q4
from fewfire.packed import Packed
from fewfire.quantize import GROUP
from fewfire.selectors.fits import Fit
from fewfire.selectors.selection import Screen

MARGINS = np.arange(2.0, 20.0)  # nats: tokens with a probability of exp(-margin) or more are made exact
_STATES = 2000  # at most, that the cost is measured on
_HELD = 0.25  # share of the sample, its end, that the regression does not use
_RIDGE = 0.01  # share of the mean variance that is added to each direction's
_BLOCK = 4096  # rows of the head that are decoded together
_CONFIDENCE = 0.95


def usual_rank(hidden: int) -> int:
    """The rank of a screen for a hidden size; see perf/LOG.md, "the rank of a head's screen"."""
    return min(hidden, 64 * max(1, round(hidden / 144)))


def fit(packed: Packed, observation: Observation, rank: int | None = None) -> Fit:
    """A screen, and its cost by the share of tokens that are made exact; all layers must have been observed.

    "densities" (D,): that share, rising to 1; for each "margins" in nats, "errors": the mean KL(dense || screened) in
    nats, and "missed": at most how often the dense model's most probable token is not made exact (Clopper and Pearson
    1934, 95 %), all measured on sample text that the regression did not use. "rows", "basis", "bias", "rank" as in
    `Screen`.
    """
    states, config = observation.final, packed.config
    rank = usual_rank(config.hidden_size) if rank is None else rank
    held = max(1, round(_HELD * len(states)))
    used, held_out = states[:-held], states[-held:][:: -(-held // _STATES)]
    mean = used.mean(axis=0, dtype=np.float64).astype(np.float32)
    covariance = _covariance(used - mean)
    rows, basis = _regress(packed, covariance, rank)
    bias = np.concatenate([_bias(lacking, mean, covariance) for lacking in _lacking(packed, rows, basis, rank)])
    cost = _cost(packed, Screen(rows, basis, rank, bias, np.inf), held_out)
    return {**cost, "rows": rows, "basis": basis, "bias": bias, "rank": np.array(rank)}


def fill(packed: Packed, fits: Sequence[Fit], densities: Sequence[float]) -> Screen:
    """The screen that makes a share of tokens exact, between measured shares by interpolation of the margin.

    Over the largest share that was measured all of them. Raises `ValueError` for one under the least.
    """
    (found,), (density,) = fits, densities
    measured = found["densities"]
    if not measured[0] <= density <= 1:
        raise ValueError(f"density must be from {measured[0]:.2g}, the least that was measured, to 1, not {density}")
    kept = len(measured) - 1
    margin = (
        np.inf
        if density == 1 or density > measured[kept - 1]
        else np.interp(density, measured[:kept], found["margins"][:kept])
    )
    return Screen(found["rows"], found["basis"], int(found["rank"]), found["bias"], float(margin))


def _covariance(centred: np.ndarray) -> np.ndarray:
    found = (centred.T @ centred).astype(np.float64) / max(1, len(centred))
    return found + np.eye(len(found)) * max(_RIDGE * np.trace(found) / len(found), 1e-12)


def _regress(packed: Packed, covariance: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The stored factors of S: rows `(vocab, bytes)` and basis `(rank, bytes)`."""
    hidden, of = len(covariance), packed.formats
    root, gram = linalg.cholesky(covariance, lower=True), np.zeros((hidden, hidden))
    for rows in _head(packed):
        gram += rows.T @ rows
    leading = linalg.eigh(root.T @ gram @ root, subset_by_index=(hidden - rank, hidden - 1))[1][:, ::-1]
    project = (root @ leading).astype(np.float32)
    basis = linalg.solve_triangular(root, leading, trans=1, lower=True).T
    stored = [quantize.encode(rows @ project, of.rows, "dot", fit_q4).view(np.uint8) for rows in _head(packed)]
    encoded = quantize.encode(np.ascontiguousarray(basis, np.float32), of.table, "dot", fit_q4)
    return np.concatenate(stored), encoded.view(np.uint8)


def _head(packed: Packed) -> Iterator[np.ndarray]:
    """The rows of the head, some at a time."""
    for start in _starts(packed):
        yield head_rows(packed, start, start + _BLOCK)


def _lacking(packed: Packed, rows: np.ndarray, basis: np.ndarray, rank: int) -> Iterator[np.ndarray]:
    """W - S as S is stored, some rows at a time."""
    directions = quantize.decode(basis, packed.formats.table, "dot", packed.config.hidden_size)
    for start, exact in zip(_starts(packed), _head(packed), strict=True):
        part = quantize.decode(rows[start : start + _BLOCK], packed.formats.rows, "dot", rank)
        yield exact - part @ directions


def _bias(lacking: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """What the mean of exp(logit) asks for, for rows of W - S `(n, hidden)`: `(n,)`."""
    return lacking @ mean + np.einsum("vh,vh->v", lacking @ covariance.astype(np.float32), lacking) / np.float32(2)


def _cost(packed: Packed, screen: Screen, states: np.ndarray) -> Fit:
    """Densities, margins, errors and missed of a screen over final hidden states `(T, hidden)`."""
    of, count, bins = packed.formats, len(states), len(MARGINS) + 1
    reduced = _rounded(states @ quantize.decode(screen.basis, of.table, "dot", states.shape[1]).T, of.rows)
    parts = [special.logsumexp(_screened(packed, screen, reduced, start), axis=1) for start in _starts(packed)]
    total = special.logsumexp(parts, axis=0).astype(np.float32)
    # For each state, by a token's screened -log p: tokens, and sums of exp(exact), exp(screened) and exp(exact)
    # (exact - screened). What makes probabilities of the screened logits is taken off both, which nothing depends on.
    sums = np.zeros((4, count * bins))
    best, depth = np.full(count, -np.inf, np.float32), np.zeros(count, np.float32)
    for start in _starts(packed):
        screened = _screened(packed, screen, reduced, start) - total[:, None]
        exact = states @ head_rows(packed, start, start + _BLOCK).T - total[:, None]
        top = exact.argmax(axis=1)[:, None]
        value, under = (np.take_along_axis(each, top, axis=1)[:, 0] for each in (exact, -screened))
        best, depth = np.maximum(best, value), np.where(value > best, under, depth)
        place = np.searchsorted(MARGINS, -screened) + bins * np.arange(count)[:, None]
        likely = np.exp(np.minimum(exact, np.float32(80)))
        for found, weights in zip(sums, (None, likely, np.exp(screened), likely * (exact - screened)), strict=True):
            found += np.bincount(place.reshape(-1), None if weights is None else weights.reshape(-1), found.size)
    tokens, exact_sums, screened_sums, apart = sums.reshape(4, count, bins).cumsum(axis=2)
    whole = exact_sums[:, -1:]
    beyond = (apart[:, -1:] - apart) / whole
    divergence = beyond + np.log((exact_sums + screened_sums[:, -1:] - screened_sums) / whole)
    density, errors = tokens.mean(axis=0) / packed.config.vocab_size, np.maximum(divergence.mean(axis=0), 0)
    misses = (depth[:, None] > np.append(MARGINS, np.inf)).sum(axis=0)
    keep = np.flatnonzero(np.append((np.diff(density) > 0) & (density[:-1] > 0), True))
    return {
        "densities": density[keep],
        "margins": np.append(MARGINS, np.inf)[keep],
        "errors": np.append(np.minimum.accumulate(errors[keep][:-1]), 0),
        "missed": np.append(_at_most(misses[keep][:-1], count), 0),
    }


def _starts(packed: Packed) -> range:
    return range(0, packed.config.vocab_size, _BLOCK)


def _screened(packed: Packed, screen: Screen, reduced: np.ndarray, start: int) -> np.ndarray:
    """Screened logits of a block of tokens, `(T, tokens)`."""
    rows = quantize.decode(screen.rows[start : start + _BLOCK], packed.formats.rows, "dot", screen.rank)
    return reduced @ rows.T + screen.bias[start : start + _BLOCK]


def _rounded(x: np.ndarray, weights: str) -> np.ndarray:
    """As a vector is before it meets q4 rows, which is the only rounding that shows."""
    if weights != "q4":
        return x
    padded = np.zeros((len(x), quantize.padded(x.shape[1])), np.float32)
    padded[:, : x.shape[1]] = x
    groups = padded.reshape(len(x), -1, GROUP)
    scale = np.maximum(np.abs(groups).max(axis=2, keepdims=True) / np.float32(127), np.float32(1e-30))
    return np.ascontiguousarray((np.rint(groups / scale) * scale).reshape(padded.shape)[:, : x.shape[1]])


def _at_most(misses: np.ndarray, count: int) -> np.ndarray:
    """The upper confidence bound of a share of which so many of `count` cases were seen."""
    return np.where(misses < count, special.betaincinv(misses + 1, np.maximum(count - misses, 1), _CONFIDENCE), 1.0)
