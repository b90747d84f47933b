"""Activations with exact zeros, as modules that map a gate's pre-activations to its factor, `(..., neurons)`.

`TopK` is that of The Lazy Neuron Phenomenon (2210.06313, section 5). `Threshold` keeps what another activation gives
where that is large, and is zero elsewhere: with SiLU it is CATS (2404.08763), with ReLU the FATReLU of ProSparse
(2402.13516, section 3.2). Measured from a centre (`centre.py`) it is zero where the other is near that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewfire.config import THRESHOLDED, Activation

SAMPLED = 64  # tokens of a forward pass whose sizes a threshold is measured on


def apply(kind: Activation, x: Tensor) -> Tensor:
    """The activation function of the FFN, apart from thresholds, as `reference.activate` has it."""
    match THRESHOLDED.get(kind, kind):
        case "silu":
            return functional.silu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
        case "relu2":
            return functional.relu(x).square()
    raise AssertionError(kind)


class Plain(nn.Module):
    """An activation without a threshold."""

    def __init__(self, kind: Activation) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.kind, x)


class TopK(nn.Module):
    """act(x) where |act(x)| is among the k largest of its token, zero elsewhere: exactly k are kept, ties broken."""

    def __init__(self, kind: Activation, k: int) -> None:
        super().__init__()
        self.kind, self.k = kind, k

    def forward(self, x: Tensor) -> Tensor:
        y = apply(self.kind, x)
        kept = y.detach().abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(y).scatter(-1, kept, y.gather(-1, kept))


class Cut(nn.Module):
    """act(x), less the neuron's centre if there are centres, where that is over its threshold, zero elsewhere.

    Over it in absolute value. Thresholds and centres come from a checkpoint.
    """

    least: Tensor
    centre: Tensor | None

    def __init__(self, kind: Activation, least: Tensor, centre: Tensor | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("least", least)  # (neurons,)
        self.register_buffer("centre", centre)  # (neurons,)

    def moved(self, x: Tensor) -> Tensor:
        """What is compared with the thresholds."""
        y = apply(self.kind, x)
        return y if self.centre is None else y - self.centre

    def forward(self, x: Tensor) -> Tensor:
        y = self.moved(x)
        return torch.where(y.detach().abs() > self.least, y, y.new_zeros(()))


class Threshold(Cut):
    """The same with thresholds that move while training.

    Neurons matter unequally, so sizes are weighted before they are compared with one `cut`: a neuron's threshold is
    cut / weight. While `tracking`, a training pass leaves a sample of its weighted sizes for whoever moves the cut.
    """

    weight: Tensor
    cut: Tensor

    def __init__(self, kind: Activation, weight: Tensor, centre: Tensor | None = None) -> None:
        super().__init__(kind, torch.full_like(weight, -1.0), centre)
        self.tracking = False
        self.register_buffer("weight", weight)  # (neurons,)
        self.register_buffer("cut", weight.new_full((), -1.0))
        self.samples: list[Tensor] = []  # each (tokens, neurons)

    def set(self, cut: float) -> None:
        """Moves the cut; under 0 everything is kept."""
        self.cut.fill_(cut)
        torch.div(self.cut, self.weight, out=self.least)
        if cut < 0:
            self.least.fill_(-1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.tracking and self.training:
            rows = x.detach().flatten(0, -2)
            self.samples.append(self.moved(rows[:: -(-len(rows) // SAMPLED)]).abs() * self.weight)
        return y
