"""A packed model's weights as the checkpoint had them, as far as the format kept them: float32, canonical names.

For everything that computes in NumPy over a packed model. A layer at a time, because a whole model in float32 would
not fit where the packed one does.
"""

from __future__ import annotations

import numpy as np

from fewfire.packed import Packed
from fewfire.quantize import decode, row_bytes


def layer_tensors(packed: Packed, layer: int) -> dict[str, np.ndarray]:
    """Every tensor of one layer, named without the layer's prefix ("gate.weight"); rows are outputs.

    `down.weight` is a view whose columns, the neurons, are contiguous.
    """
    at = f"layers.{layer}."
    return {
        name.removeprefix(at): _tensor(packed, name.removeprefix(at), layer)
        for name in packed.config.shapes()
        if name.startswith(at)
    }


def embedding_rows(packed: Packed, ids: np.ndarray) -> np.ndarray:
    """The embeddings of tokens, `(len(ids), hidden)`, before the embedding scale."""
    return decode(packed.arrays["embed"][0][ids], packed.formats.table, "dot", packed.config.hidden_size)


def head_rows(packed: Packed, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows `start` to `stop` of the output head, `(rows, hidden)`: times a final hidden state, the tokens' logits."""
    head = packed.arrays.get("head", packed.arrays["embed"])
    return decode(head[0][start:stop], packed.formats.table, "dot", packed.config.hidden_size)


def final_norm(packed: Packed) -> dict[str, np.ndarray]:
    """The tensors of the final norm under their canonical names."""
    names = {"final_norm": "final_norm.weight", "final_norm_bias": "final_norm.bias"}
    return {canonical: packed.arrays[name][0] for name, canonical in names.items() if name in packed.arrays}


def _tensor(packed: Packed, name: str, layer: int) -> np.ndarray:
    c, arrays, of = packed.config, packed.arrays, packed.formats
    part, kind = name.split(".")
    if part == "down" and kind == "weight":
        up = row_bytes(of.rows, c.hidden_size) if c.gated else 0
        return decode(arrays["updown"][layer][:, up:], of.down, "axpy", c.hidden_size).T
    if part == "up" and kind == "weight":
        rows = arrays["updown"][layer][:, : row_bytes(of.rows, c.hidden_size)]
        return decode(rows, of.rows, "dot", c.hidden_size)
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    array, start, stop = {
        "q": ("qkv", 0, queries),
        "k": ("qkv", queries, queries + keys),
        "v": ("qkv", queries + keys, queries + 2 * keys),
    }.get(part, (part, 0, None))
    if kind == "bias":
        return arrays[f"{array}_bias"][layer, start:stop]
    if "norm" in part or part in ("act_threshold", "act_centre"):
        return arrays[array][layer]
    return decode(arrays[array][layer, start:stop], of.matrix(part), "dot", queries if part == "o" else c.hidden_size)
