"""Which neurons a `Predictor` keeps, in NumPy: its recall and precision are taken from this."""

from __future__ import annotations

import numpy as np

from fewfire.observe import Layer
from fewfire.packed import Formats
from fewfire.quantize import decode
from fewfire.selectors.fitting import spread
from fewfire.selectors.selection import Predictor


def predicted(predictor: Predictor, formats: Formats, layer: Layer) -> np.ndarray:
    """A mask of the neurons that are kept for each token, `(T, neurons)`.

    With the stored weights of the predictor, but without the engine's rounding of what they meet.
    """
    return spread(scores(predictor, formats, layer) > 0, predictor.members[layer.number])


def scores(predictor: Predictor, formats: Formats, layer: Layer) -> np.ndarray:
    """The groups' scores with their biases, `(T, groups)`: those over 0 are kept."""
    z, number = layer.ffn_in, layer.number
    if predictor.basis is not None:
        z = z @ decode(predictor.basis[number], formats.rows, "dot", z.shape[1]).T  # (T, rank)
    return z @ decode(predictor.rows[number], formats.rows, "dot", z.shape[1]).T + predictor.bias[number]
