"""Replacing the FFN's activation by one with exact zeros, and what moves it towards more of them while training.

`Thresholds` keeps the original activation where it is large: the share of zeros rises with the steps from what costs
little to the wanted one, so that the model is near the original all the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewfire.train.activations import Threshold
from fewfire.train.losses import relative_error
from fewfire.train.method import Method
from fewfire.train.network import LayerState, Network

MOVES = 0.1  # how far a cut moves in a step towards what the step's sample asks for
_WINDOWS = 4  # of a forward pass


@dataclass(frozen=True)
class Rise:
    """The wanted share of zeros by step: from `start` to `end`, slower and slower, over the first `share` of the steps.

    In the last `rest` of the steps the thresholds stay where they are.
    """

    end: float
    steps: int
    start: float = 0.5
    share: float = 0.6
    rest: float = 0.1

    def sparsity(self, step: int) -> float:
        """What is wanted at a step."""
        done = min(1.0, step / max(1.0, self.share * self.steps))
        return self.end + (min(self.start, self.end) - self.end) * (1 - done) ** 2

    def moves(self, step: int) -> bool:
        """Whether thresholds still move."""
        return step < (1 - self.rest) * self.steps


def neuron_weights(network: Network, windows: np.ndarray) -> list[Tensor]:
    """By layer, what |act(gate)| of each neuron is multiplied with before sizes are compared, `(neurons,)`.

    What the neuron then adds to the residual stream, as a share of that: the norm of its down row times the root mean
    square of its up value, over the root mean square of the stream's norm. The first token of a window is left out of
    the latter: its stream is a hundred times larger than all others'.
    """
    ups = [torch.zeros(network.config.intermediate_size) for _ in network.layers]
    streams = [0.0] * len(network.layers)

    def observe(number: int, state: LayerState) -> None:
        if state.up is not None:
            ups[number] += state.up.square().sum(dim=(0, 1)).cpu()
        streams[number] += float(state.out[:, 1:].square().sum())

    with torch.no_grad():
        for at in range(0, len(windows), _WINDOWS):
            ids = torch.from_numpy(windows[at : at + _WINDOWS].astype(np.int64))
            network.hidden(ids.to(network.embed.weight.device), observe)
        found = []
        for layer, up, stream in zip(network.layers, ups, streams, strict=True):
            weight = layer.down.weight.norm(dim=0).cpu()
            if layer.up is not None:
                weight = weight * (up / windows.size).sqrt()
            found.append(weight / math.sqrt(stream / (windows.size - len(windows))))
    return found


class Thresholds(Method):
    """Activations cut off where they are small, the cut moving with the steps."""

    def __init__(self, network: Network, rise: Rise, uniform: bool = False) -> None:
        self._cuts = [layer.activation for layer in network.layers]
        self._rise, self._uniform = rise, uniform
        self._zeros: list[float] = []

    @staticmethod
    def install(network: Network, weights: Sequence[Tensor]) -> None:
        """Puts the activations into the network, all still open."""
        for layer, weight in zip(network.layers, weights, strict=True):
            layer.activation = Threshold(network.config.hidden_act, weight.to(network.embed.weight.device))

    def begin(self, step: int) -> None:
        self._zeros = []
        for cut in self._cuts:
            cut.tracking = self._rise.moves(step)
            cut.samples.clear()

    def observe(self, number: int, state: LayerState) -> None:
        self._zeros.append(float((state.gate.detach() == 0).float().mean()))

    def end(self, step: int) -> None:
        """Moves the cuts towards the quantiles of the step's samples that are wanted next."""
        if not self._rise.moves(step):
            return
        wanted = self._rise.sparsity(step + 1)
        samples = [torch.cat(cut.samples).flatten() for cut in self._cuts]
        everywhere = quantile(torch.cat(samples), wanted) if not self._uniform else 0.0
        for cut, sample in zip(self._cuts, samples, strict=True):
            target = quantile(sample, wanted) if self._uniform else everywhere
            now = float(cut.cut)
            cut.set(target if now < 0 else now + MOVES * (target - now))
            cut.samples.clear()

    def figures(self) -> dict[str, float]:
        return {"zeros": float(np.mean(self._zeros))}


def quantile(values: Tensor, share: float) -> float:
    """The value that a share of all values are not over."""
    return float(values.kthvalue(min(max(1, round(share * len(values))), len(values))).values)


class Residuals(Method):
    """Another method, plus the layers' relative errors against a teacher that reads along: layer-wise distillation."""

    def __init__(self, method: Method, teacher: Network, weight: float) -> None:
        self._method, self._teacher, self._weight = method, teacher, weight
        self._wanted: list[Tensor] = []
        self._errors: list[Tensor] = []

    def begin(self, step: int) -> None:
        self._method.begin(step)

    def watch(self, ids: Tensor) -> None:
        self._method.watch(ids)
        self._wanted, self._errors = [], []
        with torch.no_grad():
            self._teacher.hidden(ids, lambda number, state: self._wanted.append(state.out))

    def observe(self, number: int, state: LayerState) -> None:
        self._method.observe(number, state)
        self._errors.append(relative_error(state.out, self._wanted[number]))

    def losses(self) -> dict[str, Tensor]:
        return {**self._method.losses(), "layers": torch.stack(self._errors).mean() * self._weight}

    def end(self, step: int) -> None:
        self._method.end(step)

    def figures(self) -> dict[str, float]:
        return self._method.figures()
