"""Fitting a screen for the output head: the head in few bits, and what it costs to trust it by how far.

A screen is a transform code (Huang and Schultheiss 1963). With W the head without its mean row (which adds the same to
all logits, and would be most of what has to be coded), C the covariance of the final hidden states x of sample text and
m their mean: for any A with C = A Aᵀ, and Q the eigenvectors of Aᵀ Wᵀ W A, W = (W A Q) (Qᵀ A⁻¹). What lies between the
factors, Qᵀ A⁻¹ (x - m), has uncorrelated elements of variance 1, so that rounding rows of W A Q does to the logits, in
the mean, exactly what it does to the rows. Their columns fall off steeply: the first get four bits and the others two
(`codes.py`), each scaled to what its levels are best for. Where rows cannot have as many columns as the hidden size,
the last few are left out, which is the best matrix S of that rank (reduced-rank regression, Izenman 1975). See
perf/LOG.md, "a head in two bits".

A token's bias is what S lacks at the mean, (w - s) m, and half the variance of what it lacks around it, because
E exp(s x + e) = exp(s x + var(e) / 2) for a normal e: without that, all the tokens that are not made exact would
together get too little probability. Works through the head block by block; knows nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from scipy import linalg, special

from fewfire import quantize
from fewfire.observe import Observation, head_rows
from fewfire.pack import fit_q4
from fewfire.packed import Packed
from fewfire.selectors import codes
from fewfire.selectors.fits import Fit
from fewfire.selectors.selection import Screen

MARGINS = np.arange(2.0, 20.0)  # nats: tokens with a probability of exp(-margin) or more are made exact
_STATES = 2000  # at most, that the cost is measured on
_HELD = 0.25  # share of the sample, its end, that the regression does not use
_RIDGE = 0.01  # share of the mean variance that is added to each direction's
_BLOCK = 4096  # rows of the head that are decoded together
_CONFIDENCE = 0.95
_ARRAYS = "codes", "scales", "basis", "centre", "bias"


def usual_rank(hidden: int) -> int:
    """The rank of a screen for a hidden size: four fifths of it; see perf/LOG.md, "a head in two bits"."""
    return codes.most_columns(hidden * 4 // 5)


def fit(packed: Packed, observation: Observation, rank: int | None = None) -> Fit:
    """A screen, and its cost by the share of tokens that are made exact; all layers must have been observed.

    "densities" (D,): that share, rising to 1; for each "margins" in nats, "errors": the mean KL(dense || screened) in
    nats, and "missed": at most how often the dense model's most probable token is not made exact (Clopper and Pearson
    1934, 95 %), all measured on sample text that nothing was fitted to. "rank" and arrays as in `Screen`.
    """
    states, config = observation.final, packed.config
    rank = usual_rank(config.hidden_size) if rank is None else rank
    held = max(1, round(_HELD * len(states)))
    used, held_out = states[:-held], states[-held:][:: -(-held // _STATES)]
    mean = used.mean(axis=0, dtype=np.float64).astype(np.float32)
    covariance = _covariance(used - mean)
    screen = _code(packed, covariance, rank)
    bias = np.concatenate([_bias(lacking, mean, covariance) for lacking in _lacking(packed, screen)])
    screen = replace(screen, bias=bias)
    arrays = {name: getattr(screen, name) for name in _ARRAYS}
    return {**_cost(packed, screen, held_out), **arrays, "rank": np.array(rank)}


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
    arrays = {name: found[name] for name in _ARRAYS}
    return Screen(**arrays, rank=int(found["rank"]), margin=float(margin))


def _covariance(centred: np.ndarray) -> np.ndarray:
    found = (centred.T @ centred).astype(np.float64) / max(1, len(centred))
    return found + np.eye(len(found)) * max(_RIDGE * np.trace(found) / len(found), 1e-12)


def _code(packed: Packed, covariance: np.ndarray, rank: int) -> Screen:
    """S, with biases of zero."""
    hidden, table, vocab = len(covariance), packed.formats.table, packed.config.vocab_size
    total = sum(rows.sum(axis=0, dtype=np.float64) for rows in _head(packed))
    mean = np.asarray(total / vocab, np.float32)[None]
    root, gram = linalg.cholesky(covariance, lower=True), np.zeros((hidden, hidden))
    for rows in _head(packed):
        around = rows - mean
        gram += around.T @ around
    variance, leading = linalg.eigh(root.T @ gram @ root, subset_by_index=(max(0, hidden - rank), hidden - 1))
    # The columns of W A Q have these variances, but for a factor that they share.
    factor = codes.spread(rank)[: len(variance)] / np.sqrt(np.maximum(variance[::-1], 1e-12 * variance[-1] + 1e-30))
    project, basis = np.zeros((hidden, rank), np.float32), np.zeros((rank, hidden), np.float32)
    project[:, : len(variance)] = root @ leading[:, ::-1] * factor
    basis[: len(variance)] = linalg.solve_triangular(root, leading[:, ::-1] / factor, trans=1, lower=True).T
    parts = [codes.encode((rows - mean) @ project) for rows in _head(packed)]
    coded, scales = (np.concatenate(each) for each in zip(*parts, strict=True))
    met, centre = (quantize.encode(matrix, table, "dot", fit_q4).view(np.uint8) for matrix in (basis, mean))
    return Screen(coded, scales, met, centre, rank, np.zeros(vocab, np.float32), np.inf)


def _head(packed: Packed) -> Iterator[np.ndarray]:
    """The rows of the head, some at a time."""
    for start in _starts(packed):
        yield head_rows(packed, start, start + _BLOCK)


def _lacking(packed: Packed, screen: Screen) -> Iterator[np.ndarray]:
    """The head without what is stored of it, some rows at a time."""
    directions, centre = (_of_x(packed, stored) for stored in (screen.basis, screen.centre))
    for start, exact in zip(_starts(packed), _head(packed), strict=True):
        block = slice(start, start + _BLOCK)
        yield exact - centre - codes.decode(screen.codes[block], screen.scales[block]) @ directions


def _of_x(packed: Packed, stored: np.ndarray) -> np.ndarray:
    """Rows that meet the final hidden state."""
    return quantize.decode(stored, packed.formats.table, "dot", packed.config.hidden_size)


def _bias(lacking: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """What the mean of exp(logit) asks for, for rows `(n, hidden)` of what is lacking: `(n,)`."""
    return lacking @ mean + np.einsum("vh,vh->v", lacking @ covariance.astype(np.float32), lacking) / np.float32(2)


def _cost(packed: Packed, screen: Screen, states: np.ndarray) -> Fit:
    """Densities, margins, errors and missed of a screen over final hidden states `(T, hidden)`."""
    count, bins = len(states), len(MARGINS) + 1
    inner, shift = reduced(packed, screen, states)
    blocks = [slice(start, start + _BLOCK) for start in _starts(packed)]
    parts = [special.logsumexp(screened(screen, inner, shift, block), axis=1) for block in blocks]
    total = special.logsumexp(parts, axis=0).astype(np.float32)
    # For each state, by a token's screened -log p: tokens, and sums of exp(exact), exp(screened) and exp(exact)
    # (exact - screened). What makes probabilities of the screened logits is taken off both, which nothing depends on.
    sums = np.zeros((4, count * bins))
    best, depth = np.full(count, -np.inf, np.float32), np.zeros(count, np.float32)
    for block in blocks:
        cheap = screened(screen, inner, shift, block) - total[:, None]
        exact = states @ head_rows(packed, block.start, block.stop).T - total[:, None]
        top = exact.argmax(axis=1)[:, None]
        value, under = (np.take_along_axis(each, top, axis=1)[:, 0] for each in (exact, -cheap))
        best, depth = np.maximum(best, value), np.where(value > best, under, depth)
        place = np.searchsorted(MARGINS, -cheap) + bins * np.arange(count)[:, None]
        likely = np.exp(np.minimum(exact, np.float32(80)))
        for found, weights in zip(sums, (None, likely, np.exp(cheap), likely * (exact - cheap)), strict=True):
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


def reduced(packed: Packed, screen: Screen, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What rows meet, in 8 bits as the kernels have it, `(T, rank)`, and what all logits are moved by, `(T, 1)`."""
    exact = states @ _of_x(packed, screen.basis).T
    unit = np.maximum(np.abs(exact).max(axis=1, keepdims=True) / np.float32(127), np.float32(1e-30))
    return np.rint(exact / unit) * unit, states @ _of_x(packed, screen.centre).T


def screened(screen: Screen, inner: np.ndarray, shift: np.ndarray, tokens: slice = slice(None)) -> np.ndarray:
    """Screened logits `(T, tokens)` out of what `reduced` gives."""
    return inner @ codes.decode(screen.codes[tokens], screen.scales[tokens]).T + screen.bias[tokens] + shift


def _at_most(misses: np.ndarray, count: int) -> np.ndarray:
    """The upper confidence bound of a share of which so many of `count` cases were seen."""
    return np.where(misses < count, special.betaincinv(misses + 1, np.maximum(count - misses, 1), _CONFIDENCE), 1.0)
