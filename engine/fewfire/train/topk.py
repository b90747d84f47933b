"""The method `topk`: every token keeps the k neurons of a layer with the largest |act(gate)|, and the model learns so.

The Lazy Neuron Phenomenon (2210.06313, section 5) trains with Top-k from the beginning; a model that was trained
without it is led there: k falls from half of the neurons to the wanted number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewfire.config import THRESHOLDED
from fewfire.selectors.top import count
from fewfire.train.activations import TopK
from fewfire.train.method import Method, Result
from fewfire.train.network import LayerState, Network
from fewfire.train.rise import Rise


class TopKMethod(Method):
    """See the module. Changes the network's activations. Raises `ValueError` if these have thresholds."""

    def __init__(self, network: Network, rise: Rise) -> None:
        if network.config.hidden_act in THRESHOLDED:
            raise ValueError(f"the model leaves out neurons by thresholds already ({network.config.hidden_act})")
        self._neurons, self._rise = network.config.intermediate_size, rise
        self._parts = [TopK(network.config.hidden_act, self._neurons) for _ in network.layers]
        self._zeros: list[Tensor] = []
        for layer, part in zip(network.layers, self._parts, strict=True):
            layer.activation = part
        self.begin(0)

    def begin(self, step: int) -> None:
        self._set(self._rise.sparsity(step))
        self._zeros = []

    def observe(self, number: int, state: LayerState) -> None:
        self._zeros.append((state.gate.detach() == 0).float().mean())

    def end(self, step: int) -> None:
        """So that a measurement after the step, or the export, has the next step's k."""
        self._set(self._rise.sparsity(step + 1))

    def _set(self, sparsity: float) -> None:
        for part in self._parts:
            part.k = count(self._neurons, 1 - sparsity)

    def figures(self) -> dict[str, float]:
        return {"zeros": float(torch.stack(self._zeros).mean())}

    def result(self) -> Result:
        return Result(sparsity={"version": 1, "method": "topk", "k": [part.k for part in self._parts]})
