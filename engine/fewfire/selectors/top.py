"""The k neurons of a layer with the largest |act(gate)|: the method `topk` (The Lazy Neuron Phenomenon, 2210.06313).

Every token keeps the same number of neurons, so an easy token reads as many as a hard one. Knows nothing of how k is
chosen, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewfire.selectors.threshold import DENSITIES, TOKENS, check_density, left_out


def count(neurons: int, density: float) -> int:
    """How many neurons are kept, at least one. Raises `ValueError` for a density that is not a share."""
    check_density(density)
    return max(1, round(density * neurons))


def errors(
    gate: np.ndarray,
    inputs: np.ndarray,
    matrix: np.ndarray,
    energy: np.ndarray,
    densities: Sequence[float] = DENSITIES,
) -> np.ndarray:
    """What it costs to keep the largest |act(gate)| of every token, `(densities,)`; as `threshold.curve` has it.

    gate: `(T, neurons)` what is compared; inputs: `(T, neurons)` what `matrix` `(hidden, neurons)` is multiplied with;
    energy: `(T,)` what |left out|² is divided by.
    """
    every, neurons = -(-len(gate) // TOKENS), gate.shape[1]
    size, inputs, energy = np.abs(gate[::every]), inputs[::every], energy[::every]
    least = [neurons - count(neurons, density) for density in densities]  # the rank of the smallest that is kept
    ordered = np.partition(size, sorted(set(least)), axis=1)  # linear in the neurons
    return np.array([left_out(inputs, size >= ordered[:, rank, None], matrix, energy) for rank in least])


def fill(neurons: int, densities: Sequence[float]) -> np.ndarray:
    """What `Selection.top` takes, `(layers,)` int32, for a density per layer."""
    return np.array([count(neurons, density) for density in densities], np.int32)
