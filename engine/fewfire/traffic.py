"""How many bytes of weights a decoded token reads: what each one does, added up once, and what the kernels counted.

Thresholds, biases and lists of a selection count as weights: beside the row of a predictor they are not small. What
all layers share (a ReLU's threshold of zero, the list of all neurons) stays in the caches and does not count, nor do
norms and the model's own biases.
"""

from __future__ import annotations

import numpy as np

from fewfire.buffers import Workspace
from fewfire.packed import Packed
from fewfire.selectors.selection import COLUMNS, Selection

_NUMBER = 4  # bytes of a threshold, a bias, an entry of a list


class Traffic:
    """Of a model with a selection or none, given the records that the kernels get."""

    def __init__(self, packed: Packed, selection: Selection | None, model: np.void, layers: np.ndarray) -> None:
        arrays = packed.arrays
        head = arrays.get("head", arrays["embed"])[0]
        rows = sum(arrays[name][0].nbytes * int((layers[f"{name}_columns"] == 0).sum()) for name in ("qkv", "o"))
        predictor = layers["groups"] * layers["predictor_stride"] + layers["rank"] * layers["basis_stride"]
        rows += int(model["table_stride"]) * int(model["hidden"]) * int((layers["bypass"] != 0).sum())
        self._always = arrays["embed"].shape[2] + rows + int(predictor.sum()) + _NUMBER * _numbers(layers, selection)
        if model["screen"] == 0:
            self._always += head.nbytes
        else:
            screened = len(head) * (int(model["screen_stride"]) + 2 * _NUMBER)
            self._always += screened + (int(model["screen_rank"]) + 1) * head.shape[1]

    def of(self, work: Workspace) -> int:
        """Bytes that the token which was decoded with these buffers read."""
        return self._always + work.bytes.value


def _numbers(layers: np.ndarray, selection: Selection | None) -> int:
    """Thresholds, biases and entries of lists that the selection has in the layers where it leaves something out."""
    if selection is None:
        return 0
    found = int(layers["groups"].sum())
    if selection.predictor:
        found += selection.predictor.members.shape[1] * int((layers["groups"] > 0).sum())
    for name in ("gate", "down", *COLUMNS):
        part = getattr(selection, name)
        if part is not None:
            limits = part if name in ("gate", "down") else part.thresholds
            found += limits.shape[1] * int((layers[f"{name}_least"] != 0).sum())
    return found
