"""Down projections that make up for what their layer's activation leaves out: least squares, layer after layer.

The rows of a layer's down matrix are the coefficients of a linear regression on what its neurons give: of the
original's residual stream after the layer, less what the sparse model has before the FFN. So each layer corrects what
those before it have lost as well; SparseGPT (2301.00774, section 3.1) has the same regression of a dense layer on the
same inputs. No backward pass, and each token counts for as many equations as the stream has dimensions, where a step of
distillation has one number for all of its tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fewfire.progress import Progress, silent
from fewfire.train.network import LayerState, Network

TOKENS = 65_536  # that are seen, at most
RIDGE = 0.1  # of the mean square of the neurons' outputs: how strongly rows are kept near to what they were
_WINDOWS = 4  # of a forward pass


@torch.no_grad()
def reconstruct(network: Network, original: Network, windows: np.ndarray, progress: Progress = silent) -> None:
    """Changes the down matrices and biases of a network, which must have some, to be near to an original one.

    windows: `(windows, T)` ids to be near on, `TOKENS` of them at most. Raises `ValueError` for a model that norms what
    down gives: its regression would not be linear.
    """
    if any(layer.ffn_post_norm is not None for layer in network.layers):
        raise ValueError("--reconstruct needs a model that adds what down gives to the stream as it is")
    network.eval()
    ids = torch.from_numpy(windows[: TOKENS // windows.shape[1]].astype(np.int64)).to(network.embed.weight.device)
    ours = [network.start(part) for part in ids.split(_WINDOWS)]
    wanted = [original.start(part) for part in ids.split(_WINDOWS)]
    for number, layer in enumerate(network.layers):
        progress("reconstructing", number, len(network.layers))
        wanted = [original.step(number, x).out for x in wanted]
        inputs = [_inputs(layer.down, network.step(number, x)) for x in ours]
        fit(layer.down, inputs, wanted)
        ours = [each.before + layer.down(each.fired) for each in inputs]
    progress("reconstructing", len(network.layers), len(network.layers))


class Inputs(NamedTuple):
    """Of a layer's down projection."""

    fired: Tensor  # (B, T, neurons)
    before: Tensor  # (B, T, hidden) the stream without its output


def _inputs(down: nn.Linear, state: LayerState) -> Inputs:
    return Inputs(state.fired, state.out - down(state.fired))


def fit(down: nn.Linear, inputs: list[Inputs], wanted: list[Tensor]) -> None:
    """Fits a down projection to what the stream should be after it, `(B, T, hidden)` for each batch.

    Errors are divided by the size of a token's stream, which the next norm does, too.
    """
    neurons = down.weight.shape[1]
    gram = down.weight.new_zeros(neurons + 1, neurons + 1)
    missing = down.weight.new_zeros(neurons + 1, down.weight.shape[0])
    for (fired, before), target in zip(inputs, wanted, strict=True):
        size = target.norm(dim=-1, keepdim=True).clamp_min(1e-20)
        rows = (torch.cat([fired, torch.ones_like(size)], dim=-1) / size).flatten(0, 1)
        gram += rows.T @ rows
        missing += rows.T @ ((target - before - down(fired)) / size).flatten(0, 1)
    diagonal = gram.diagonal()[:-1]
    diagonal += (RIDGE * diagonal.mean()).clamp_min(1e-20)  # a layer may be silent
    change = torch.linalg.solve(gram.double(), missing.double()).to(gram.dtype)
    down.weight += change[:-1].T
    down.bias += change[-1]
