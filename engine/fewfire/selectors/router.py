"""The method `router`: neurons in groups of 32, and for each group a linear score that says whether to read it.

Groups are LTE's (2402.06126): neurons that see alike are together (`groups.py`). LTE trains model and router
together, with a sigmoid and a threshold of 0.5, which is a score of 0 (`train/lte.py`). Here the router is fitted to
a model as it is, to whether a group is worth reading (`scores.py`). A model that was not trained for it fires all
over the groups, so much more has to be read than with single neurons.
"""

from __future__ import annotations

import numpy as np

from fewfire.observe import Layer
from fewfire.packed import Packed
from fewfire.selectors import fitting
from fewfire.selectors.fits import Fit
from fewfire.selectors.fitting import fill
from fewfire.selectors.groups import balanced, count
from fewfire.selectors.scores import Linear, constant, held_out, reduced_rank, refined

__all__ = ["fill", "fit"]

_TOKENS_PER_FUNCTION = 8  # that must be there to fit a weight to each function of the input


def fit(packed: Packed, layer: Layer) -> Fit:
    """Fits one layer: `fitting.curve`'s arrays, and what the layer adds to a `Predictor`."""
    inputs, gate = layer.ffn_in, layer.tensors["gate.weight"]
    neurons = len(gate)
    groups = count(neurons)
    size = -(-neurons // groups)
    members = balanced(gate, groups)
    held = held_out(len(inputs))
    lost = np.zeros((len(inputs), groups * size), np.float32)
    lost[:, :neurons] = fitting.damage(packed, layer)[:, members]
    worth = fitting.worth(packed, lost.reshape(len(lost), groups, size).sum(axis=2)[~held])
    found, mean = learnt(inputs[~held], gate, worth), inputs[~held].mean(axis=0)
    scale = np.sqrt(np.float32(groups) / max(float(np.square(found.rows).sum()), 1e-30))  # as in lowrank.py
    rows, scores = fitting.stored(packed, Linear(found.rows * scale, (found.bias + found.rows @ mean) * scale))
    scores = scores._replace(bias=scores.bias - scores.rows @ mean)
    return fitting.curve(packed, layer, scores(inputs[held]), members, held) | {
        "rows": rows,
        "bias": scores.bias,
        "members": members,
    }


def learnt(inputs: np.ndarray, gate: np.ndarray, worth: np.ndarray) -> Linear:
    """Scores of groups on the inputs `(T, hidden)`, by logistic regression of whether `worth` `(T, groups)` is over 0.

    On no more functions of the input than so many tokens can tell: those that explain best what the rows of `gate` see.
    """
    rank = max(1, min(inputs.shape[1], len(inputs) // _TOKENS_PER_FUNCTION))
    functions = reduced_rank(inputs, inputs @ gate.T, rank)
    mean = inputs.mean(axis=0)
    found = refined(constant(worth, rank), (inputs - mean) @ functions.T, worth)
    rows = found.rows @ functions
    return Linear(rows, found.bias - rows @ mean)
