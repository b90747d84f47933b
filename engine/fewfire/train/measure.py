"""How a network predicts windows of text, and how many of its neurons are exactly zero meanwhile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fewfire.train.network import LayerState, Network

_AT_ONCE = 256  # tokens whose logits over the whole vocabulary are in memory
_WINDOWS = 4  # of a forward pass


@dataclass(frozen=True)
class Measured:
    """Of the tokens of all windows; the first of each is not scored."""

    perplexity: float
    zeros: float  # share of act(gate) that is exactly zero
    layers: list[float]  # the same by layer


@torch.no_grad()
def measure(network: Network, windows: np.ndarray) -> Measured:
    """Over `(windows, T)` ids, each from an empty context."""
    network.eval()
    zeros = np.zeros(network.config.num_hidden_layers)
    total, device = 0.0, network.embed.weight.device

    def observe(number: int, state: LayerState) -> None:
        zeros[number] += int((state.gate == 0).sum())

    for at in range(0, len(windows), _WINDOWS):
        ids = torch.from_numpy(windows[at : at + _WINDOWS].astype(np.int64)).to(device)
        hidden = network.hidden(ids, observe)[:, :-1].flatten(0, 1)
        for states, targets in zip(hidden.split(_AT_ONCE), ids[:, 1:].flatten().split(_AT_ONCE), strict=True):
            log_p = torch.log_softmax(network.logits(states), dim=-1)
            total -= float(log_p.gather(-1, targets[:, None]).sum(dtype=torch.float64))
    shares = zeros / (windows.size * network.config.intermediate_size)
    scored = len(windows) * (windows.shape[1] - 1)
    return Measured(math.exp(min(total / scored, 700.0)), float(shares.mean()), shares.tolist())
