"""The method `router`: neurons in groups of 32, and for each group a linear score that says whether to read it.

Groups are LTE's (2402.06126, section 3.2): balanced k-means over gate rows, so that neurons that see alike are
together. LTE trains model and router together, with a sigmoid and a threshold of 0.5, which is a score of 0; here the
router is fitted to a model as it is, to whether a group is worth reading (`scores.py`). A model that was not trained
for it fires all over the groups, so much more has to be read than with single neurons.
"""

from __future__ import annotations

import numpy as np

from fewfire.observe import Layer
from fewfire.packed import Packed
from fewfire.selectors import fitting
from fewfire.selectors.fits import Fit
from fewfire.selectors.fitting import fill
from fewfire.selectors.scores import Linear, constant, held_out, reduced_rank, refined

__all__ = ["balanced", "fill", "fit"]

_GROUP = 32
_ROUNDS = 12  # of k-means
_TOKENS_PER_FUNCTION = 8  # that must be there to fit a weight to each function of the input


def fit(packed: Packed, layer: Layer) -> Fit:
    """Fits one layer: `fitting.curve`'s arrays, and what the layer adds to a `Predictor`."""
    inputs, gate = layer.ffn_in, layer.tensors["gate.weight"]
    hidden, neurons = inputs.shape[1], len(gate)
    groups = -(-neurons // _GROUP)
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


def balanced(rows: np.ndarray, groups: int) -> np.ndarray:
    """The row numbers group by group, `(n,)` int32, so that rows of a group point the same way: balanced k-means.

    All groups but the last have ceil(n / groups) rows. Where many rows want to join a group, the nearest do and the
    others go on to the next best: O(n groups) a round, where the best assignment of all (LTE's) takes O(n³).
    """
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-30))
    room = np.full(groups, -(-len(rows) // groups))
    room[-1] -= room.sum() - len(rows)
    centres = unit[np.random.default_rng(0).choice(len(rows), groups, replace=False)]
    for _ in range(_ROUNDS):
        group = _assigned(unit @ centres.T, room)
        centres = np.zeros_like(centres)
        np.add.at(centres, group, unit)
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), np.float32(1e-30))
    return np.argsort(group, kind="stable").astype(np.int32)


def _assigned(likeness: np.ndarray, room: np.ndarray) -> np.ndarray:
    """A group for each row, `(n,)`, none with more rows than it has room; `likeness`: `(n, groups)`."""
    left, group = room.copy(), np.full(len(likeness), -1)
    waiting = np.arange(len(likeness))
    while len(waiting):
        open_ = np.flatnonzero(left)
        among = likeness[np.ix_(waiting, open_)]
        wish, degree = open_[among.argmax(axis=1)], among.max(axis=1)
        order = np.lexsort((-degree, wish))  # by group, the nearest first
        firsts = np.searchsorted(wish[order], wish[order])
        joins = order[np.arange(len(order)) - firsts < left[wish[order]]]
        group[waiting[joins]] = wish[joins]
        np.subtract.at(left, wish[joins], 1)
        waiting = np.delete(waiting, joins)
    return group
