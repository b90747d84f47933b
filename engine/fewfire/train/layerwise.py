"""Layer-wise distillation: the residual stream after every layer is to stay near the original's."""

from __future__ import annotations

import torch
from torch import Tensor

from fewfire.train.losses import relative_error
from fewfire.train.method import Method, Result
from fewfire.train.network import LayerState, Network


class Layerwise(Method):
    """Another method, plus the layers' mean relative error, times a weight. The original reads along, which costs."""

    def __init__(self, method: Method, original: Network, weight: float) -> None:
        self._method, self._original, self._weight = method, original, weight
        self._wanted: list[Tensor] = []  # of each layer, (B, T, hidden)
        self._errors: list[Tensor] = []

    def begin(self, step: int) -> None:
        self._method.begin(step)

    def watch(self, ids: Tensor) -> None:
        self._method.watch(ids)
        self._wanted, self._errors = [], []
        with torch.no_grad():
            self._original.hidden(ids, lambda number, state: self._wanted.append(state.out))

    def observe(self, number: int, state: LayerState) -> None:
        self._method.observe(number, state)
        self._errors.append(relative_error(state.out, self._wanted[number]))

    def losses(self) -> dict[str, Tensor]:
        return {**self._method.losses(), "layers": torch.stack(self._errors).mean() * self._weight}

    def end(self, step: int) -> None:
        self._method.end(step)

    def figures(self) -> dict[str, float]:
        return self._method.figures()

    def result(self) -> Result:
        return self._method.result()
