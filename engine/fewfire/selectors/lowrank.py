"""The method `lowrank`: a small matrix product guesses which neurons matter, before any of their rows is read.

score = B (A x) + bias, as in Deja Vu (2310.17157) and PowerInfer (2312.12456), but fitted without a training run. A:
the functions of the input that predict what the gates see best, in closed form. B: by logistic regression of whether a
neuron is worth reading on A x, with A as it is stored (`scores.py`). A is not trained further: on SmolLM2-135M bases
from that regression itself were no better, and far worse in the last layers.
"""

from __future__ import annotations

import numpy as np

from fewfire import reference
from fewfire.config import THRESHOLDED, ModelConfig
from fewfire.observe import Layer
from fewfire.packed import Packed
from fewfire.quantize import decode, encode
from fewfire.selectors import fitting
from fewfire.selectors.fits import Fit
from fewfire.selectors.fitting import fill
from fewfire.selectors.scores import Linear, guessed, held_out, reduced_rank, refined

__all__ = ["fill", "fit", "rank_of"]

_TOKENS = 32  # that a function of the input is fitted to, at least
_INVERTED = 30  # steps of a fixed point, which for usual thresholds are far more than enough
_LEAST_SILU = -0.27846  # what is under it, every gate is over


def rank_of(hidden: int, tokens: int) -> int:
    """The usual rank for a model's hidden size and so many tokens to fit to: a multiple of 64, as rows are padded.

    With fewer tokens for each function a smaller rank finds more (perf/LOG.md, "a rank that the sample can carry").
    """
    return max(64, min(hidden // 8, tokens // _TOKENS) // 64 * 64) if hidden > 64 else hidden


def fit(packed: Packed, layer: Layer, *, rank: int | None = None, inputs: np.ndarray | None = None) -> Fit:
    """Fits one layer: `fitting.curve`'s arrays, and what the layer adds to a `Predictor`.

    rank: of A, from 1 to the hidden size. inputs: what is looked at, `(T, hidden)`, the FFN's input if None. A quarter
    of the tokens is held out to measure errors.
    """
    inputs, form = layer.ffn_in if inputs is None else inputs, packed.formats.rows
    held = held_out(len(inputs))
    rank = rank_of(inputs.shape[1], int((~held).sum())) if rank is None else rank
    seen = reference.linear(layer.tensors, "gate", layer.ffn_in[~held]) - _onset(packed.config, layer)
    functions = reduced_rank(inputs[~held], seen, rank)
    # Scores are only compared with each other, so all may be scaled, and float16 scales are most exact around 1.
    size = np.sqrt(np.square(functions).sum() / np.float32(rank))
    basis = encode(functions / size, form, "dot")
    z = inputs @ decode(basis, form, "dot", inputs.shape[1]).T
    mean = z[~held].mean(axis=0)
    worth = fitting.worth(packed, fitting.damage(packed, layer)[~held])
    features = (z[~held] - mean) * size
    found = refined(guessed(seen, features, worth), features, worth)
    rows, scores = fitting.stored(packed, Linear(found.rows, found.bias / size))
    scores = scores._replace(bias=scores.bias - scores.rows @ mean)
    members = np.arange(worth.shape[1], dtype=np.int32)
    return fitting.curve(packed, layer, scores(z[held]), members, held) | {
        "rows": rows,
        "basis": basis,
        "bias": scores.bias,
        "members": members,
    }


def _onset(config: ModelConfig, layer: Layer) -> np.ndarray:
    """What each neuron's gate must be over for it to fire, on the positive side: `(neurons,)`, or 0 for all."""
    threshold = layer.tensors.get("act_threshold.weight")
    if threshold is None:
        return np.zeros((), np.float32)
    over = threshold + layer.tensors.get("act_centre.weight", np.float32(0))
    if THRESHOLDED[config.hidden_act] != "silu":
        return over
    found = over = np.maximum(over, np.float32(_LEAST_SILU))
    for _ in range(_INVERTED):
        found = over * (1 + np.exp(-found))  # silu(x) = t is x = t (1 + exp(-x))
    return found
