"""Activations with exact zeros, as modules that map a gate's pre-activations to its factor, `(..., neurons)`.

`TopK` is that of The Lazy Neuron Phenomenon (2210.06313, section 5). `Threshold` keeps what another activation gives
where that is large, and is zero elsewhere: with SiLU it is CATS (2404.08763), with ReLU the FATReLU of ProSparse
(2402.13516, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewfire.config import THRESHOLDED, Activation, ModelConfig

SAMPLED = 64  # tokens of a forward pass whose sizes a threshold is measured on


def apply(kind: Activation, x: Tensor) -> Tensor:
    """The FFN's activation function, as `reference.activate` has it without thresholds."""
    match kind:
        case "silu":
            return functional.silu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
        case "relu2":
            return functional.relu(x).square()
        case _:
            raise AssertionError(f"{kind} has thresholds")


class Plain(nn.Module):
    """The activation that a model comes with."""

    def __init__(self, kind: Activation) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.kind, x)


def own(config: ModelConfig, tensors: Mapping[str, np.ndarray], layer: int) -> nn.Module:
    """The activation that a layer of a model comes with, thresholds included."""
    if config.hidden_act not in THRESHOLDED:
        return Plain(config.hidden_act)
    least = torch.from_numpy(np.array(tensors[f"layers.{layer}.act_threshold.weight"], np.float32))
    fixed = Threshold(THRESHOLDED[config.hidden_act], torch.ones_like(least))
    fixed.least.copy_(least)
    return fixed


class TopK(nn.Module):
    """act(x) where |act(x)| is among the k largest of its token, zero elsewhere: exactly k are kept, ties broken."""

    def __init__(self, kind: Activation, k: int) -> None:
        super().__init__()
        self.kind, self.k = kind, k

    def forward(self, x: Tensor) -> Tensor:
        y = apply(self.kind, x)
        kept = y.detach().abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(y).scatter(-1, kept, y.gather(-1, kept))


class Threshold(nn.Module):
    """act(x) where |act(x)| is over the neuron's threshold, zero elsewhere.

    Neurons matter unequally, so sizes are weighted before they are compared with one `cut`: a neuron's threshold is
    cut / weight. While `tracking`, a training pass leaves a sample of its weighted sizes for whoever moves the cut.
    """

    least: Tensor
    weight: Tensor
    cut: Tensor

    def __init__(self, kind: Activation, weight: Tensor) -> None:
        super().__init__()
        self.kind, self.tracking = kind, False
        self.register_buffer("weight", weight)  # (neurons,)
        self.register_buffer("least", torch.full_like(weight, -1.0))  # (neurons,)
        self.register_buffer("cut", torch.tensor(-1.0))
        self.samples: list[Tensor] = []  # each (tokens, neurons)

    def set(self, cut: float) -> None:
        """Moves the cut; under 0 everything is kept."""
        self.cut.fill_(cut)
        torch.div(self.cut, self.weight, out=self.least)
        if cut < 0:
            self.least.fill_(-1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = apply(self.kind, x)
        size = y.detach().abs()
        if self.tracking and self.training:
            rows = size.flatten(0, -2)
            self.samples.append(rows[:: -(-len(rows) // SAMPLED)] * self.weight)
        return torch.where(size > self.least, y, y.new_zeros(()))
