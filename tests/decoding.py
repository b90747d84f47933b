"""Reading tokens one at a time, as selections are used, and holding what comes out against a twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from fewfire.model import Model
from fewfire.packed import Packed
from fewfire.selectors import Selection
from tiny import prompt

T = TypeVar("T")
IDS = prompt(20)
_CLEAR = 3e-6  # float32 rounding of the values is under that, of large ones in proportion


def decoded(model: Model, ids: Sequence[int] = IDS) -> np.ndarray:
    """The logits after each token, `(T, vocab)`."""
    session = model.session()
    return np.stack([session.feed([token]) for token in ids])


class Margin:
    """How near a twin's decisions come to the opposite ones, which another order of additions might lead to."""

    def __init__(self) -> None:
        self.least = np.inf

    def over(self, values: np.ndarray, limits: np.ndarray | float) -> np.ndarray:
        """Which values are over their limits."""
        size = max(1.0, float(np.median(np.abs(values))))
        self.least = min(self.least, float(np.abs(values - limits).min()) / size)
        return values > limits

    def largest(self, values: np.ndarray, count: int) -> np.ndarray:
        """Which values are over all but the `count` largest of their row; none of them may be negative."""
        ordered = np.sort(values, axis=1)[:, ::-1]
        if count == 0:
            return np.zeros(values.shape, bool)
        limits = ordered[:, count - 1 : count + 1].mean(axis=1, keepdims=True)
        return self.over(values, limits)


def decided(draw: Callable[[], Selection], twin: Callable[[Selection, Margin], T]) -> tuple[Selection, T]:
    """A random selection all of whose decisions are clear, and what the twin makes of it."""
    for _ in range(30):
        selection, margin = draw(), Margin()
        found = twin(selection, margin)
        if margin.least > _CLEAR:
            return selection, found
    raise AssertionError("no selection was clear")


def check_against(packed: Packed, selection: Selection, theirs: np.ndarray, threads: int) -> Model:
    """The model with the selection gives the twin's logits, other ones than dense, and the same with one thread."""
    model = Model(packed, threads, dense=True)
    dense = decoded(model)
    model.engine.select(selection, dense=True)
    ours = decoded(model)
    assert np.abs(ours - theirs).max() < 2e-4
    assert np.abs(ours - dense).max() > 0.01
    one = Model(packed, 1, dense=True)
    one.engine.select(selection, dense=True)
    np.testing.assert_array_equal(decoded(one), ours)
    return model
