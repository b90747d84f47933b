"""Thresholds on activations for a wanted density, and what they cost: the methods `gate` and `down`.

CATS (2404.08763) keeps the neurons whose |act(gate)| is over a quantile of the layer's, TEAL (2408.14690) does so with
the |h| that down meets. Neurons differ in what they do to the output, so the values are weighted first, by the norm of
the neuron's down row (as WINA, 2505.19427, does with columns) and, where its up value is not known yet, by the root
mean square of that. At run time this costs nothing: weight * |value| > cut is |value| > cut / weight.

All arrays are float32 of one layer; T are tokens of sample text. Knows nothing of models and files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

TOKENS = 1024  # at most so many are enough to measure errors
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def down_weights(down: np.ndarray) -> np.ndarray:
    """What |act(gate) * up| of each neuron is multiplied with, `(neurons,)`; `down` is `(hidden, neurons)`."""
    return np.sqrt(np.einsum("hn,hn->n", down, down))


def gate_weights(up: np.ndarray | None, down: np.ndarray) -> np.ndarray:
    """What |act(gate)| of each neuron is multiplied with, `(neurons,)`.

    `up`: `(T, neurons)` what act(gate) is multiplied with, None in models without it; `down`: `(hidden, neurons)`.
    """
    weights = down_weights(down)
    return weights if up is None else weights * np.sqrt(np.einsum("tn,tn->n", up, up) / np.float32(len(up)))


def thresholds(values: np.ndarray, density: float, weights: np.ndarray | None = None) -> np.ndarray:
    """The threshold of each neuron, `(neurons,)`, over which |value| is in a share `density` of all cases.

    `values`: `(T, neurons)`, `weights`: `(neurons,)`, all alike if None. -1 everywhere at density 1, +inf at 0.
    Raises `ValueError` for a density that is not a share.
    """
    weights = np.ones(values.shape[1], np.float32) if weights is None else weights
    return per_neuron(float(cuts(values, (density,), weights)[0]), weights)


def cuts(values: np.ndarray, densities: Sequence[float], weights: np.ndarray) -> np.ndarray:
    """For each density what weight * |value| has to be over, `(densities,)`; see `thresholds`."""
    for density in densities:
        check_density(density)
    found = np.full(len(densities), -1, np.float32)
    ranks = [values.size - round(density * values.size) - 1 for density in densities]  # the largest that is dropped
    inside = sorted({rank for rank in ranks if rank >= 0})
    if inside:
        ordered = np.partition((np.abs(values) * weights).reshape(-1), inside)
        for i, (rank, density) in enumerate(zip(ranks, densities, strict=True)):
            if rank >= 0:
                found[i] = ordered[rank] if density > 0 else np.inf
    return found


def check_density(density: float) -> None:
    """Raises `ValueError` unless it is a share."""
    if not 0 <= density <= 1:
        raise ValueError(f"density must be from 0 to 1, not {density}")


def per_neuron(cut: float, weights: np.ndarray) -> np.ndarray:
    """cut / weight, `(neurons,)`: +inf for a neuron of weight 0, whatever the cut, unless that keeps all."""
    if cut < 0:
        return np.full(len(weights), -1, np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(weights > 0, np.float32(cut) / weights, np.float32(np.inf)).astype(np.float32)


def keep(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Which neurons are read, bool `(T, neurons)`: those whose |value| is over their threshold."""
    return np.abs(values) > limits


@dataclass(frozen=True)
class Curve:
    """The damage by density: what `calibrate` spreads a density over layers with.

    `errors`: the mean over tokens of |what is left out|² / |the residual stream after the block|².
    """

    densities: np.ndarray  # (D,) rising
    cuts: np.ndarray  # (D,) of weight * |value|
    errors: np.ndarray  # (D,)
    weights: np.ndarray  # (neurons,)

    @classmethod
    def of(cls, fit: Mapping[str, np.ndarray]) -> Curve:
        """The curve in a fit, whatever else that has."""
        return cls(*(fit[field.name] for field in fields(cls)))

    def cut(self, density: float) -> float:
        """What weight * |value| has to be over, between the measured densities by linear interpolation."""
        if density < self.densities[0]:
            raise ValueError(f"density must be at least {self.densities[0]:g}, the least that was measured")
        check_density(density)
        kept = np.maximum(self.cuts, 0)  # a cut of -1 keeps what a cut just under the least value does
        return -1.0 if density >= 1 else float(np.interp(density, self.densities, kept))

    def error(self, density: float) -> float:
        """The error at a density, interpolated."""
        return float(np.interp(density, self.densities, self.errors))

    def thresholds(self, density: float) -> np.ndarray:
        """The neurons' thresholds for a density, `(neurons,)`, as `Selection.gate` and `.down` take them."""
        return per_neuron(self.cut(density), self.weights)


def curve(
    values: np.ndarray,
    weights: np.ndarray,
    inputs: np.ndarray,
    matrix: np.ndarray,
    energy: np.ndarray,
    densities: Sequence[float] = DENSITIES,
) -> Curve:
    """What it costs to leave out the inputs of a projection by the size of weighted `values`.

    values: `(T, n)` what is compared, `act(gate)` or `inputs` itself; inputs: `(T, n)` what `matrix` `(outputs, n)` is
    multiplied with (`act(gate) * up` and down for an FFN); energy: `(T,)` what |left out|² is divided by, see `energy`.
    Exact: what is left out goes through the matrix, so that neurons that cancel out each other do.
    """
    found = cuts(values, densities, weights)
    every = -(-len(values) // TOKENS)
    size, inputs, energy = np.abs(values[::every]) * weights, inputs[::every], energy[::every]
    errors = [left_out(inputs, size > cut, matrix, energy) for cut in found]
    return Curve(np.array(densities), found, np.array(errors), weights)


def left_out(inputs: np.ndarray, kept: np.ndarray, matrix: np.ndarray, energy: np.ndarray) -> float:
    """The mean over tokens of |matrix (inputs that are not kept)|² / energy."""
    lost = np.where(kept, np.float32(0), inputs) @ matrix.T
    return float(np.mean(np.einsum("th,th->t", lost, lost) / energy))


def energy(residual: np.ndarray, output: np.ndarray, normed: np.ndarray | None = None) -> np.ndarray:
    """What |an error of a block's output|² is divided by, `(T,)`: |the residual stream after the block|².

    residual: before the block's output is added; output: of the block; normed: the output after a norm of its own, in
    families that have one; the error is scaled like the output. Divided token by token, because the next norm is, and
    because the first position of many models is a thousand times larger than all others.
    """
    added = output if normed is None else normed
    after = residual + added
    found = np.einsum("th,th->t", after, after)
    if normed is not None:
        found = found * _squares(output) / np.maximum(_squares(normed), np.float32(1e-30))
    return np.maximum(found, np.float32(1e-30))


def _squares(x: np.ndarray) -> np.ndarray:
    return np.einsum("th,th->t", x, x)
