"""The tiny models as .gguf files, changed as llama.cpp's converter changes them.

`write_tiny_gguf("qwen3", path)` writes the same weights as `tiny.write_tiny`: q and k permuted for the llama
architecture, 1 added to Gemma's norms, Llama 3's RoPE scaling as a tensor of factors, the tokenizer in the
metadata. Written with the gguf package and sharing no code with the reader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from tiny import CHATML, SPECIALS, tiny_config, tiny_shapes, tiny_tensor, tiny_tokenizer

ARCHITECTURES = {
    "llama": "llama",
    "llama-tied": "llama",
    "llama-bias": "llama",
    "llama-linear": "llama",
    "llama-llama3": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = _NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_tiny_gguf(
    family: str,
    path: Path,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    replace: dict[str, np.ndarray | None] | None = None,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a tiny model. `metadata` adds integers; `replace` changes tensors, or leaves them out (None)."""
    config = tiny_config(family, **overrides)
    arch = ARCHITECTURES[family]
    writer = GGUFWriter(path, arch)
    _write_config(writer, arch, config)
    if tokenizer:
        _write_tokenizer(writer)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    tensors = {stored_name(arch, name): _tensor(arch, config, name, shape) for name, shape in tiny_shapes(config)}
    if family == "llama-llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(config)
    for name, values in (tensors | (replace or {})).items():
        if values is None:
            continue
        if values.ndim == 1 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_name(arch: str, name: str) -> str:
    """A Hugging Face tensor name in llama.cpp's words."""
    names = _GEMMA_NAMES if arch == "gemma3" else _NAMES
    stem, _, end = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{names[part]}.{end}"
    return f"{names[stem]}.{end}"


def _tensor(arch: str, config: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = tiny_tensor(config, name, shape)
    if arch == "gemma3" and name.endswith("norm.weight"):
        values = values + np.float32(1)
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        halves = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
        values = halves.swapaxes(1, 2).reshape(shape)
    return np.ascontiguousarray(values)


def _llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """By how much Llama 3 divides each frequency, in the piecewise form of llama.cpp's converter."""
    scaling, dim = config["rope_scaling"], config["hidden_size"] // config["num_attention_heads"]
    low, high, old = (
        scaling[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    factors = []
    for frequency in 1.0 / config["rope_theta"] ** (np.arange(0, dim, 2) / dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(scaling["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def _write_config(writer: GGUFWriter, arch: str, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if arch == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_uint32("gemma3.attention.sliding_window_pattern", config["sliding_window_pattern"])
    scaling = config.get("rope_scaling")
    if scaling and "linear" in scaling.values():
        writer.add_string(f"{arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{arch}.rope.scaling.factor", scaling["factor"])


def _write_tokenizer(writer: GGUFWriter) -> None:
    model = json.loads(tiny_tokenizer())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
