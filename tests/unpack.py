"""A packed model's weights as the checkpoint had them, decoded in plain NumPy: what the oracle needs of one."""

from __future__ import annotations

import numpy as np

from fewfire.packed import Packed
from fewfire.quantize import decode, row_bytes


def tensors(packed: Packed) -> dict[str, np.ndarray]:
    """Every tensor of `config.shapes()` under its canonical name, float32."""
    c, arrays, of = packed.config, packed.arrays, packed.formats
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    up = row_bytes(of.rows, c.hidden_size) if c.gated else 0
    places = {
        "q": ("qkv", 0, queries),
        "k": ("qkv", queries, queries + keys),
        "v": ("qkv", queries + keys, queries + 2 * keys),
    }

    def tensor(name: str, columns: int) -> np.ndarray:
        if name.startswith(("embed", "head")):
            return decode(arrays[name.removesuffix(".weight")][0], of.table, "dot", columns)
        *layer, part, kind = name.split(".")
        at = int(layer[1]) if layer else 0
        if part == "positions":
            return arrays["positions"]
        if kind == "bias" or "norm" in part:
            array, start, stop = places.get(part, (part, 0, None))
            return arrays[array if kind == "weight" else f"{array}_bias"][at, start:stop]
        if part == "down":
            return decode(arrays["updown"][at][:, up:], of.down, "axpy", c.hidden_size).T
        if part == "up":
            return decode(arrays["updown"][at][:, :up], of.rows, "dot", columns)
        array, start, stop = places.get(part, (part, 0, None))
        return decode(arrays[array][at, start:stop], of.rows, "dot", columns)

    return {name: np.array(tensor(name, shape[-1])) for name, shape in c.shapes().items()}
