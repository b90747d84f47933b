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
    hidden, neurons = inputs.shape[1], len(gate)
    groups = count(neurons)
    size = -(-neurons // groups)
    members = balanced(gate, groups)
    held = held_out(len(inputs))
    lost = np.zeros((len(inputs), groups * size), np.float32)
    lost[:, :neurons] = fitting.damage(packed, layer)[:, members]
    worth = fitting.worth(packed, lost.reshape(len(lost), groups, size).sum(axis=2)[~held])
    rank = max(1, min(hidden, int((~held).sum()) // _TOKENS_PER_FUNCTION))
    functions = reduced_rank(inputs[~held], inputs[~held] @ gate.T, rank)
    mean = inputs[~held].mean(axis=0)
    found = refined(constant(worth, rank), (inputs[~held] - mean) @ functions.T, worth)
    whole = found.rows @ functions  # (groups, hidden)
    scale = np.sqrt(np.float32(groups) / max(float(np.square(whole).sum()), 1e-30))  # as in lowrank.py
    rows, scores = fitting.stored(packed, Linear(whole * scale, found.bias * scale))
    scores = scores._replace(bias=scores.bias - scores.rows @ mean)
    return fitting.curve(packed, layer, scores(inputs[held]), members, held) | {
        "rows": rows,
        "bias": scores.bias,
        "members": members,
        "early": np.array(False),
    }
