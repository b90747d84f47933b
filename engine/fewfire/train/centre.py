"""Centres of activations, and the bypass that gives what they would: a SiLU idles near a value that is not zero.

A neuron that idles gives about c up(x), where c is what its act(gate) is near to then. Over all neurons that is linear
in x, down diag(c) up x, one matrix of the hidden size squared, which costs a token an eighth to a twelfth of the FFN
that it belongs to. What is left to the neurons is (act(gate) - c) up, of which most is nearly nothing. SCAP
(2412.07174, mode-centering) moves the inputs of projections by their mode and has a bias for it; here a factor of a
product is moved, which takes a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fewfire.train.network import Bypass, LayerState, Network
from fewfire.train.thresholds import quantile, read, up_energy

ROUNDS = 4
_EVERY = 8  # tokens of which one is looked at


def fit_centres(network: Network, windows: np.ndarray, weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """By layer, the values near which the neurons idle, `(neurons,)`.

    In turn: with centres, a share `sparsity` of all neurons and tokens is nearest to them, and idles; a neuron's centre
    is the mean of its act(gate) where it idles, which leaves the least energy there (Lloyd's iteration). Energies count
    as shares of the token's residual stream. windows: `(windows, T)` ids; weights: see `thresholds.neuron_weights`.
    """
    gates: list[list[Tensor]] = [[] for _ in network.layers]
    energies: list[list[Tensor]] = [[] for _ in network.layers]

    def observe(number: int, state: LayerState) -> None:
        gates[number].append(state.gate.flatten(0, 1)[::_EVERY].clone())
        energies[number].append(up_energy(state).flatten(0, 1)[::_EVERY].clone())

    read(network, windows, observe)
    layers = []
    for weight in weights:  # which forgets the pieces as they are joined
        gate, energy = torch.cat(gates.pop(0)), torch.cat(energies.pop(0))
        layers.append((gate, energy, weight.to(gate.device)))
    centres = [_mean(gate, energy) for gate, energy, _ in layers]
    for _ in range(ROUNDS):
        sizes = [(gate - c).abs() * weight for (gate, _, weight), c in zip(layers, centres, strict=True)]
        cut = quantile(torch.cat([size[::_EVERY].flatten() for size in sizes]), sparsity)
        centres = [_mean(gate, energy * (size <= cut)) for (gate, energy, _), size in zip(layers, sizes, strict=True)]
    return centres


def _mean(gate: Tensor, energy: Tensor) -> Tensor:
    """The mean of each neuron's values, weighted; 0 for a neuron that never idles."""
    return (gate * energy).sum(dim=0) / energy.sum(dim=0).clamp_min(1e-20)


@torch.no_grad()
def add_bypasses(network: Network, centres: Sequence[Tensor]) -> None:
    """Gives every layer the matrix for its centres. What they make of up's bias goes into down's."""
    for layer, centre in zip(network.layers, centres, strict=True):
        down, up = layer.down, layer.up
        layer.bypass = Bypass((down.weight * centre) @ up.weight)
        if up.bias is not None:
            down.bias += down.weight @ (centre * up.bias)
