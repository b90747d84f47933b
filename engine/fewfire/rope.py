"""Rotary embeddings out of a config.json, in the two spellings that transformers has had.

Older files have rope_theta and rope_scaling, newer ones rope_parameters, perhaps one per layer type. Promises
a `Rope` or a one-line `CheckpointError` that names the field. Knows nothing of families.
"""

from __future__ import annotations

from fewfire.config import Rope
from fewfire.errors import CheckpointError
from fewfire.fields import Fields

_MAX_CONTEXT = 1 << 28


def read_rope(fields: Fields, layer_type: str, theta: float) -> Rope:
    """The RoPE of one type of layers, "full_attention" or "sliding_attention"; `theta` is the default."""
    if fields.number("partial_rotary_factor", 0, 1, 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "1 (partial RoPE is not supported)")
    scaling = fields.section("rope_parameters")
    if scaling is not None and ("full_attention" in scaling or "sliding_attention" in scaling):
        scaling = scaling.section(layer_type)
    elif layer_type == "sliding_attention":
        scaling = None  # rope_scaling, and rope_parameters that are not per layer type, are for the global layers
    elif scaling is None:
        scaling = fields.section("rope_scaling")
    if scaling is None:
        return Rope(theta)
    theta = scaling.number("rope_theta", 1, 1e12, theta)
    kind = scaling.text("rope_type", default=None) or scaling.text("type", default="default")
    if scaling.number("partial_rotary_factor", 0, 1, 1.0) != 1.0:
        raise scaling.error("partial_rotary_factor", "1 (partial RoPE is not supported)")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", factor=scaling.number("factor", 1e-6, 1e6))
    if kind != "llama3":
        raise CheckpointError(
            f"{scaling.where}: RoPE type {kind[:40]!r} is not supported; supported: default, linear, llama3"
        )
    low = scaling.number("low_freq_factor", 1e-6, 1e6)
    high = scaling.number("high_freq_factor", 1e-6, 1e6)
    if high <= low:
        raise scaling.error("high_freq_factor", f"more than low_freq_factor, {low:g}")
    return Rope(
        theta,
        "llama3",
        factor=scaling.number("factor", 1e-6, 1e6),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=scaling.whole(
            "original_max_position_embeddings",
            1,
            _MAX_CONTEXT,
            default=fields.whole("original_max_position_embeddings", 1, _MAX_CONTEXT, default=None)
            or fields.whole("max_position_embeddings", 1, _MAX_CONTEXT),
        ),
    )
