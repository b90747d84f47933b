"""The table of model families: what each one's config.json means and what it calls its tensors.

`read_config` turns a config.json in the Hugging Face layout into a `ModelConfig`, or raises a one-line
`CheckpointError` that names the field and what is supported. `Family.names` gives a canonical tensor's name
in the checkpoint. Knows nothing of files, and nothing after the reader knows a family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fewfire.config import Activation, ModelConfig
from fewfire.errors import CheckpointError
from fewfire.fields import Fields
from fewfire.rope import read_rope

# Bounds against damaged files, far above any model that a CPU could run.
MAX_VOCAB, MAX_WIDTH, MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_CONTEXT = (
    1 << 24,
    1 << 20,
    1024,
    1024,
    2048,
    1 << 28,
)

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "relu_squared": "relu2",
    "fatrelu": "fatrelu",
    "fatsilu": "fatsilu",
    "centred_silu": "centred_silu",
}

_DECODER_NAMES = {
    "embed": "model.embed_tokens",
    "attn_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "o": "model.layers.{}.self_attn.o_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
    "act_threshold": "model.layers.{}.mlp.act_threshold",
    "act_centre": "model.layers.{}.mlp.act_centre",
    "bypass": "model.layers.{}.mlp.bypass",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_GEMMA3_NAMES = _DECODER_NAMES | {
    "attn_post_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "ffn_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
_OPT_NAMES = {
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "attn_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "q": "model.decoder.layers.{}.self_attn.q_proj",
    "k": "model.decoder.layers.{}.self_attn.k_proj",
    "v": "model.decoder.layers.{}.self_attn.v_proj",
    "o": "model.decoder.layers.{}.self_attn.out_proj",
    "ffn_norm": "model.decoder.layers.{}.final_layer_norm",
    "gate": "model.decoder.layers.{}.fc1",
    "down": "model.decoder.layers.{}.fc2",
    "act_threshold": "model.decoder.layers.{}.act_threshold",
    "final_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}


def canonical_to(names: Mapping[str, str], canonical: str) -> str:
    """A canonical tensor name such as "layers.3.q.weight" in the words of a table of names."""
    parts = canonical.split(".")
    if parts[0] == "layers":
        return f"{names[parts[2]].format(parts[1])}.{parts[3]}"
    return f"{names[parts[0]]}.{parts[1]}"


@dataclass(frozen=True)
class Family:
    """One row of the table. `read` adds what is particular to the family to the common fields."""

    architectures: tuple[str, ...]  # the class names in config.json
    model_type: str  # used where config.json has no architectures
    read: Callable[[Fields, ModelConfig], ModelConfig]
    names: Mapping[str, str]
    tied: bool = False  # when config.json does not say
    theta: float = 10_000.0  # when config.json does not say
    head_dim: int = 0  # when config.json does not say; 0 means hidden_size / heads
    intermediate: str = "intermediate_size"
    activation: str = "hidden_act"
    norm_offset: float = 0.0  # added to every norm weight: Gemma stores w where it means 1 + w
    position_offset: int = 0  # unused rows before the first learned position


def _plain(fields: Fields, config: ModelConfig) -> ModelConfig:
    """Llama, and what sparse checkpoints made of it."""
    bias = fields.flag("attention_bias", False)
    return replace(config, qkv_bias=bias, o_bias=bias)


def _mistral(fields: Fields, config: ModelConfig) -> ModelConfig:
    """One window over all layers. Where the field is missing (not null) transformers takes 4096."""
    window = fields.whole("sliding_window", 1, MAX_CONTEXT, default=0) if "sliding_window" in fields.data else 4096
    return _with_window(config, window, (True,) * config.num_hidden_layers)


def _bamboo(fields: Fields, config: ModelConfig) -> ModelConfig:
    """Mistral with an activation on both halves of the FFN."""
    return replace(_mistral(fields, config), act_on_up=True)


def _qwen_window(fields: Fields, config: ModelConfig) -> ModelConfig:
    """A window on the upper layers, only where it is switched on."""
    if not fields.flag("use_sliding_window", False):
        return config
    first = fields.whole("max_window_layers", 0, 1 << 31, default=28)
    layers = _layer_types(fields, config, lambda i: i >= first)
    return _with_window(config, fields.whole("sliding_window", 1, MAX_CONTEXT, default=0), layers)


def _qwen2(fields: Fields, config: ModelConfig) -> ModelConfig:
    return replace(_qwen_window(fields, config), qkv_bias=True)


def _qwen3(fields: Fields, config: ModelConfig) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    return replace(_qwen_window(fields, config), qkv_bias=bias, o_bias=bias, qk_norm=True)


def _gemma3(fields: Fields, config: ModelConfig) -> ModelConfig:
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if fields.data.get(name):
            raise fields.error(name, "null (softcapping and bidirectional attention are not supported)")
    pattern = fields.whole(
        "sliding_window_pattern",
        1,
        MAX_LAYERS,
        default=fields.whole("_sliding_window_pattern", 1, MAX_LAYERS, 6),
    )
    layers = _layer_types(fields, config, lambda i: (i + 1) % pattern != 0)
    config = _with_window(config, fields.whole("sliding_window", 1, MAX_CONTEXT, 4096), layers)
    bias = fields.flag("attention_bias", False)
    return replace(
        config,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        post_norms=True,
        attention_scale=fields.number("query_pre_attn_scalar", 1e-6, 1e9, 256) ** -0.5,
        embedding_scale=embedding_scale(config.hidden_size),
        rope_local=read_rope(fields, "sliding_attention", fields.number("rope_local_base_freq", 1, 1e12, 10_000)),
    )


def _opt(fields: Fields, config: ModelConfig) -> ModelConfig:
    if not fields.flag("do_layer_norm_before", True):
        raise fields.error("do_layer_norm_before", "true (OPT with norms after the blocks is not supported)")
    if fields.whole("word_embed_proj_dim", 1, MAX_WIDTH, config.hidden_size) != config.hidden_size:
        raise fields.error(
            "word_embed_proj_dim",
            f"hidden_size, {config.hidden_size} (projected embeddings are not supported)",
        )
    if not fields.flag("layer_norm_elementwise_affine", True) or fields.flag("_remove_final_layer_norm", False):
        raise CheckpointError(f"{fields.where}: OPT without the weights of its layer norms is not supported")
    bias = fields.flag("enable_bias", True)
    return replace(
        config, norm="layer", norm_eps=1e-5, gated=False, qkv_bias=bias, o_bias=bias, ffn_bias=bias, rope=None
    )


FAMILIES: dict[str, Family] = {
    "Llama": Family(("LlamaForCausalLM", "SparseLlamaForCausalLM"), "llama", _plain, _DECODER_NAMES),
    "Mistral": Family(("MistralForCausalLM",), "mistral", _mistral, _DECODER_NAMES),
    "Bamboo": Family(("BambooForCausalLM",), "bamboo", _bamboo, _DECODER_NAMES),
    "Qwen2": Family(("Qwen2ForCausalLM",), "qwen2", _qwen2, _DECODER_NAMES),
    "Qwen3": Family(("Qwen3ForCausalLM",), "qwen3", _qwen3, _DECODER_NAMES, head_dim=128),
    "Gemma 3": Family(
        ("Gemma3ForCausalLM",),
        "gemma3_text",
        _gemma3,
        _GEMMA3_NAMES,
        tied=True,
        theta=1e6,
        head_dim=256,
        activation="hidden_activation",
        norm_offset=1.0,
    ),
    "OPT": Family(
        ("OPTForCausalLM",),
        "opt",
        _opt,
        _OPT_NAMES,
        tied=True,
        intermediate="ffn_dim",
        activation="activation_function",
        position_offset=2,
    ),
}


def supported() -> str:
    """The architectures, for error messages."""
    return ", ".join(name for family in FAMILIES.values() for name in family.architectures)


def family_of(fields: Fields) -> tuple[str, Family]:
    """The row of the table for a config.json, by architecture or else by model type."""
    architectures = fields.data.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    kind = fields.data.get("model_type")
    for name, family in FAMILIES.items():
        if named in family.architectures or (named is None and kind == family.model_type):
            return name, family
    unknown = named or kind
    if not isinstance(unknown, str):
        raise CheckpointError(f"{fields.where}: architectures and model_type are missing; supported: {supported()}")
    raise CheckpointError(f"{fields.where}: architecture {unknown[:80]!r} is not supported; supported: {supported()}")


def read_config(data: Mapping[str, Any], where: str = "config.json") -> tuple[Family, ModelConfig]:
    """The family and the `ModelConfig` of a config.json. Raises `CheckpointError`."""
    fields = Fields(data, where)
    name, family = family_of(fields)
    if "quantization_config" in fields:
        raise CheckpointError(
            f"{where}: the checkpoint is already quantised (quantization_config); "
            "use the original in f32, f16 or bf16, or a .gguf file"
        )
    if "sparse_config" in fields:
        raise CheckpointError(f"{where}: sparse attention (sparse_config) is not supported")
    hidden = fields.whole("hidden_size", 1, MAX_WIDTH)
    heads = fields.whole("num_attention_heads", 1, MAX_HEADS)
    if "head_dim" not in fields and not family.head_dim and hidden % heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size, {hidden}")
    vocab = fields.whole("vocab_size", 1, MAX_VOCAB)
    act = fields.text(family.activation, default=None) or fields.text("hidden_act", default=None)
    config = ModelConfig(
        architecture=name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.whole(family.intermediate, 1, MAX_WIDTH),
        num_hidden_layers=fields.whole("num_hidden_layers", 1, MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=fields.whole("num_key_value_heads", 1, MAX_HEADS, default=heads),
        head_dim=fields.whole("head_dim", 1, MAX_HEAD_DIM, default=family.head_dim or hidden // heads),
        max_position_embeddings=fields.whole("max_position_embeddings", 1, MAX_CONTEXT),
        norm_eps=fields.number("rms_norm_eps", 0, 1, default=1e-6),
        hidden_act=_activation(fields, family.activation, act),
        ffn_bias=fields.flag("mlp_bias", False),
        norm_relu=fields.flag("norm_relu", False),
        tie_word_embeddings=fields.flag("tie_word_embeddings", family.tied),
        rope=read_rope(fields, "full_attention", fields.number("rope_theta", 1, 1e12, family.theta)),
        bos_token_id=next(iter(fields.ids("bos_token_id", vocab)), None),
        eos_token_ids=fields.ids("eos_token_id", vocab),
    )
    config = family.read(fields, config)
    check_heads(config, fields)
    try:
        config.check()
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return family, config


def read_thresholds(data: Mapping[str, Any], layers: int, where: str = "config.json") -> tuple[float, ...]:
    """What a thresholded activation's values must be over, layer by layer, where a layer has no tensor of them.

    In `hidden_act_param`: one number for all layers, or a list of one for each; nothing if it is missing.
    """
    fields, name = Fields(data, where), "hidden_act_param"
    if name not in fields:
        return ()
    if not isinstance(data[name], list):
        return (fields.number(name, 0, 1e30),) * layers
    each = {f"{name}[{i}]": value for i, value in enumerate(fields.items(name, layers) or ())}
    return tuple(Fields(each, where).number(item, 0, 1e30) for item in each)


def check_heads(
    config: ModelConfig, fields: Fields, kv_name: str = "num_key_value_heads", dim: str = "head_dim"
) -> None:
    """What a single field's range cannot say."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise fields.error(kv_name, f"a divisor of the number of heads, {config.num_attention_heads}")
    if config.rope is not None and config.head_dim % 2:
        raise CheckpointError(f"{fields.where}: {dim} is {config.head_dim}, expected an even number")


def embedding_scale(hidden_size: int) -> float:
    """Gemma's factor on the embeddings, in float32 as transformers keeps it in a float32 model."""
    return float(np.float32(hidden_size**0.5))


def _activation(fields: Fields, name: str, value: str | None) -> Activation:
    if value is None:
        raise fields.error(name, "one of " + ", ".join(_ACTIVATIONS))
    if value not in _ACTIVATIONS:
        raise CheckpointError(
            f"{fields.where}: activation {value[:40]!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[value]


def _with_window(config: ModelConfig, window: int, layers: tuple[bool, ...]) -> ModelConfig:
    if not window or not any(layers):
        return config
    return replace(config, sliding_window=window, sliding_layers=layers)


def _layer_types(fields: Fields, config: ModelConfig, default: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers have the window: the list that newer configs write, or else the family's rule."""
    types = fields.items("layer_types", config.num_hidden_layers)
    if types is None:
        return tuple(default(i) for i in range(config.num_hidden_layers))
    if any(kind not in ("full_attention", "sliding_attention") for kind in types):
        raise fields.error("layer_types", "only full_attention and sliding_attention")
    return tuple(kind == "sliding_attention" for kind in types)
