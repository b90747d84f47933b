"""Moving the thresholds of all layers so that a wanted share of the activations is zero.

Sizes |act(gate)| are weighted by what the neuron then does to the residual stream, and compared with one cut for the
whole model, so that layers in which little matters become sparser than others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fewfire.config import Activation
from fewfire.train.activations import Threshold
from fewfire.train.network import LayerState, Network

MOVES = 0.2  # how far a cut moves in a step towards what the step's sample asks for
_WINDOWS = 4  # of a forward pass


def neuron_weights(network: Network, windows: np.ndarray) -> list[Tensor]:
    """By layer, what |act(gate)| of each neuron is multiplied with before sizes are compared, `(neurons,)`.

    What the neuron then adds to the residual stream, as a share of that: the norm of its down row times the root mean
    square of its up value over the norm of the stream. Divided token by token, because some tokens' streams are a
    hundred times larger than all others'. windows: `(windows, T)` ids.
    """
    squares = [torch.zeros(network.config.intermediate_size) for _ in network.layers]

    def observe(number: int, state: LayerState) -> None:
        squares[number] += up_energy(state).sum(dim=(0, 1)).cpu()

    read(network, windows, observe)
    norms = [layer.down.weight.detach().norm(dim=0).cpu() for layer in network.layers]
    return [norm * (square / windows.size).sqrt() for norm, square in zip(norms, squares, strict=True)]


def up_energy(state: LayerState) -> Tensor:
    """The squares of what act(gate) is multiplied with, as shares of the token's stream, `(B, T, neurons)`."""
    up = torch.ones_like(state.gate) if state.up is None else state.up
    return up.square() / state.out.square().sum(dim=-1, keepdim=True).clamp_min(1e-20)


@torch.no_grad()
def read(network: Network, windows: np.ndarray, observe: object = None) -> None:
    """Lets a network read `(windows, T)` ids."""
    for at in range(0, len(windows), _WINDOWS):
        ids = torch.from_numpy(windows[at : at + _WINDOWS].astype(np.int64))
        network.hidden(ids.to(network.embed.weight.device), observe)  # type: ignore[arg-type]


class Cuts:
    """The thresholds of all layers of a network, into which it puts its activations; at first they keep everything."""

    def __init__(
        self,
        network: Network,
        kind: Activation,
        weights: Sequence[Tensor],
        uniform: bool = False,
        centres: Sequence[Tensor] | None = None,
    ) -> None:
        """uniform: the same sparsity in every layer, with a cut of each one's own; centres: `(neurons,)` by layer."""
        self._uniform, self.parts = uniform, list[Threshold]()
        for number, (layer, weight) in enumerate(zip(network.layers, weights, strict=True)):
            layer.activation = Threshold(
                kind, weight.to(network.embed.weight.device), centres[number] if centres else None
            )
            self.parts.append(layer.activation)

    def track(self, tracking: bool) -> None:
        """Whether forward passes leave samples from now on; forgets those that are there."""
        for part in self.parts:
            part.tracking = tracking
            part.samples.clear()

    def set(self, cut: float) -> None:
        """One cut for all."""
        for part in self.parts:
            part.set(cut)

    def move(self, sparsity: float, by: float = MOVES) -> None:
        """Moves each cut towards the one that makes such a share of the samples zero, and forgets the samples."""
        samples = [torch.cat(part.samples).flatten() for part in self.parts]
        everywhere = 0.0 if self._uniform else quantile(torch.cat(samples), sparsity)
        for part, sample in zip(self.parts, samples, strict=True):
            target, now = quantile(sample, sparsity) if self._uniform else everywhere, float(part.cut)
            part.set(now + by * (target - now))
            part.samples.clear()

    def calibrate(self, network: Network, windows: np.ndarray, sparsity: float) -> None:
        """Sets the cuts that make such a share zero on some windows, `(windows, T)` ids."""
        network.train()
        self.track(True)
        read(network, windows)
        self.move(sparsity, by=1.0)
        self.track(False)


def quantile(values: Tensor, share: float) -> float:
    """The value that a share of all values are not over."""
    return float(values.kthvalue(min(max(1, round(share * len(values))), len(values))).values)
