"""What the fits of all methods have in common: their form, and what their errors are divided by."""

from __future__ import annotations

import numpy as np

from fewfire import reference
from fewfire.config import CENTRED
from fewfire.observe import Layer
from fewfire.packed import Packed
from fewfire.selectors import threshold

#: What was fitted for one layer, or for the head; at least "densities", rising, and "errors", falling.
Fit = dict[str, np.ndarray]


def ffn_energy(packed: Packed, layer: Layer, every: int = 1) -> np.ndarray:
    """What an error of the FFN's output is divided by, of every so many tokens: see `threshold.energy`."""
    some = slice(None, None, every)
    output, normed = _output(packed, layer, "down", layer.fired[some], "ffn_post_norm")
    if packed.config.hidden_act in CENTRED:  # which have no norm behind
        output = output + reference.linear(layer.tensors, "bypass", layer.ffn_in[some])
    return threshold.energy(layer.residual[some], output, normed)


def attention_energy(packed: Packed, layer: Layer) -> np.ndarray:
    """The same of the attention's output, `(T,)`."""
    output, normed = _output(packed, layer, "o", layer.joined, "attn_post_norm")
    before = layer.residual - (output if normed is None else normed)
    return threshold.energy(before, output, normed)


def _output(
    packed: Packed, layer: Layer, projection: str, inputs: np.ndarray, norm: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """What a block puts out, and that after the norm of its own in families that have one."""
    output = reference.linear(layer.tensors, projection, inputs)
    return output, reference.normed(packed.config, layer.tensors, norm, output) if packed.config.post_norms else None
