"""Neurons in groups of like ones: balanced k-means over gate rows (Learn To be Efficient, 2402.06126, section 4.1).

LTE clusters the columns of the first matrix of the FFN into experts of 32; in a gated FFN these are the gate's rows.
Knows nothing of models.
"""

from __future__ import annotations

import numpy as np

GROUP = 32
_ROUNDS = 12  # of k-means


def count(neurons: int, size: int = GROUP) -> int:
    """How many groups it takes so that none is larger than `size`."""
    return -(-neurons // size)


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
