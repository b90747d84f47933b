"""A model's config.json in the Hugging Face layout: that which it came with, or one written for what came as .gguf.

Promises that `families.read_config` reads from it the configuration that was asked for, token ids apart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewfire.checkpoint import Checkpoint, read_json
from fewfire.config import THRESHOLDED, ModelConfig, Rope
from fewfire.errors import CheckpointError
from fewfire.families import FAMILIES, read_config

_NAMES = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # where they differ from ours


def with_biases(config: ModelConfig) -> ModelConfig:
    """With all biases that its config.json says it has: OPT's has one switch for those of all projections."""
    one_switch = config.architecture == "OPT" and config.ffn_bias
    return replace(config, qkv_bias=True, o_bias=True) if one_switch else config


def hf_config(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    """For a checkpoint whose configuration has become `config`. Raises `CheckpointError` where it cannot be said."""
    file = checkpoint.path / "config.json"
    data = read_json(file)[1] if file.is_file() else _written(checkpoint.config)
    family = FAMILIES[config.architecture]
    data[family.activation] = _NAMES.get(config.hidden_act, config.hidden_act)
    data |= {"torch_dtype": "float16", "norm_relu": config.norm_relu}
    data["enable_bias" if config.architecture == "OPT" else "mlp_bias"] = config.ffn_bias
    if config.hidden_act in THRESHOLDED:
        data.pop("hidden_act_param", None)  # there is a tensor of them
    if not _says(data, config):
        raise CheckpointError(
            f"{checkpoint.path}: a config.json cannot describe this model, so all that training can leave is "
            "an adapter: use relufy or plain, with --rank or --adapter"
        )
    return data


def _says(data: dict[str, Any], config: ModelConfig) -> bool:
    """Whether a config.json is understood as a configuration, but for token ids, which other files have as well."""
    try:
        found = read_config(data)[1]
    except CheckpointError:
        return False
    found = replace(found, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_ids)
    return replace(found, add_bos_token=config.add_bos_token) == config


def _written(c: ModelConfig) -> dict[str, Any]:
    family = FAMILIES[c.architecture]
    data: dict[str, Any] = {
        "architectures": list(family.architectures[:1]),
        "model_type": family.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        family.intermediate: c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_word_embeddings,
        "attention_bias": c.qkv_bias,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": list(c.eos_token_ids),
    }
    if c.rope is not None:
        data |= {"rope_theta": c.rope.theta, "rope_scaling": _scaling(c.rope)}
    if c.rope_local is not None:
        data["rope_local_base_freq"] = c.rope_local.theta
    if c.attention_scale:
        data["query_pre_attn_scalar"] = round(c.attention_scale**-2, 6)
    if c.sliding_window:
        kinds = ["sliding_attention" if slides else "full_attention" for slides in c.sliding_layers]
        data |= {"sliding_window": c.sliding_window, "use_sliding_window": True, "layer_types": kinds}
    return data


def _scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    return {
        "rope_type": rope.scaling,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }
