"""A packed model's weights as the checkpoint had them, all at once: what the oracle needs of one."""

from __future__ import annotations

import numpy as np

from fewfire.packed import Packed
from fewfire.unpack import embedding_rows, final_norm, head_rows, layer_tensors


def tensors(packed: Packed) -> dict[str, np.ndarray]:
    """Every tensor of `config.shapes()` under its canonical name, float32."""
    c = packed.config
    out = {"embed.weight": embedding_rows(packed, np.arange(c.vocab_size)), "head.weight": head_rows(packed)}
    if c.rope is None:
        out["positions.weight"] = packed.arrays["positions"]
    for i in range(c.num_hidden_layers):
        out |= {f"layers.{i}.{name}": tensor for name, tensor in layer_tensors(packed, i).items()}
    out |= final_norm(packed)
    return {name: np.array(out[name]) for name in c.shapes()}
