"""Transformers as the peer that the engine is compared with; needs the `peers` extra.

Two ways to a torch model: `from_directory` lets transformers itself read a checkpoint, so that a name,
transpose or config key which we misread shows; `transformers_model` builds one from our canonical
tensors, so that a GGUF file, or anything else that we can read, has a peer with the very same weights.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from fewfire.config import THRESHOLDED, ModelConfig, Rope

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

Model = Any  # a transformers.PreTrainedModel


class Readable(Protocol):
    """What is needed of a `fewfire.checkpoint.Checkpoint`."""

    @property
    def config(self) -> ModelConfig: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...


def logits(model: Model, ids: Sequence[int]) -> np.ndarray:
    """The logits after each of `ids`, `(T, vocab_size)` float32."""
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).logits[0].float().numpy()


def greedy(model: Model, ids: Sequence[int], n: int) -> list[int]:
    """The `n` likeliest next tokens one after the other, whether or not they end the text."""
    # set on the model, because None in an argument means "as the model has it"
    model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=n, pad_token_id=0)
    start = torch.tensor([list(ids)])
    out = model.generate(start, attention_mask=torch.ones_like(start))
    return out[0, len(ids) :].tolist()


def from_directory(directory: Path) -> Model:
    """Transformers' own reading of a directory; families that it lacks are patched onto a Llama."""
    data = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind, act = data["model_type"], data.get("hidden_act", "")
    if kind not in ("sparsellama", "bamboo") and not act.startswith(("fat", "centred")):
        model = _load(transformers.AutoModelForCausalLM, directory)
    else:
        stored, alike = load_file(directory / "model.safetensors"), torch.tensor(data.pop("hidden_act_param", 0.0))
        ffns = [_ffn(stored, f"model.layers.{i}.mlp.", alike) for i in range(data["num_hidden_layers"])]
        config = transformers.LlamaConfig(**{k: v for k, v in data.items() if k not in ("model_type", "hidden_act")})
        model = _load(transformers.LlamaForCausalLM, directory, config=config)
        patch_ffn(model, _BASES[act], ffns, act_on_up=kind == "bamboo")
    if data.get("norm_relu"):
        patch_norms(model)
    return model


def transformers_model(checkpoint: Readable) -> Model:
    """A torch model with the weights of a checkpoint, read under their canonical names."""
    config = checkpoint.config
    state, own = {}, {}
    for name in config.shapes():
        values = checkpoint.read(name)
        if any(part in name for part in Ffn._fields):
            own[name] = torch.from_numpy(values)
            continue
        if config.post_norms and "norm" in name:
            values = values - 1  # Gemma multiplies with 1 + w
        if name == "positions.weight":
            values = np.concatenate([np.zeros((2, config.hidden_size), np.float32), values])  # OPT starts at 2
        state[hf_name(config, name)] = torch.from_numpy(values)

    settings = transformers.AutoConfig.for_model(**_settings(config))
    model = _load(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)], None, config=settings, state_dict=state)
    if config.rope:
        for layer in model.model.layers:
            layer.self_attn.scaling = config.scale
        if config.rope.factors:
            model.model.rotary_emb.inv_freq /= torch.tensor(config.rope.factors)
    if config.hidden_act in THRESHOLDED or config.act_on_up:
        ffns = [_ffn(own, f"layers.{i}.", torch.zeros(1)) for i in range(config.num_hidden_layers)]
        patch_ffn(model, _BASES[config.hidden_act], ffns, act_on_up=config.act_on_up)
    if config.norm_relu:
        patch_norms(model)
    return model


def _load(cls: Any, source: Path | None, **options: Any) -> Model:
    """Float32, and eager attention, which is the plainest."""
    cls._keys_to_ignore_on_load_unexpected = list(Ffn._fields)
    model, report = cls.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not any(report.values()), report  # a missing tensor would be random, without a word
    return model.eval()


def hf_name(config: ModelConfig, name: str) -> str:
    """The name of a canonical tensor in transformers' state dict."""
    opt, gemma = config.rope is None, config.post_norms
    names = {
        "embed": "embed_tokens",
        "positions": "embed_positions",
        "final_norm": "final_layer_norm" if opt else "norm",
        "attn_norm": "self_attn_layer_norm" if opt else "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj" if opt else "self_attn.o_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "attn_post_norm": "post_attention_layernorm",
        "ffn_norm": "final_layer_norm" if opt else "pre_feedforward_layernorm" if gemma else "post_attention_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
        "gate": "fc1" if opt else "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "fc2" if opt else "mlp.down_proj",
    }
    if name == "head.weight":
        return "lm_head.weight"
    *layer, part, kind = name.split(".")
    return ".".join(["model", *(["decoder"] if opt else []), *layer, names[part], kind])


def _settings(config: ModelConfig) -> dict[str, Any]:
    """A transformers config, its family chosen by the features of `config` and not by its name."""
    acts = {"gelu_tanh": "gelu_pytorch_tanh", "fatrelu": "relu", "fatsilu": "silu", "centred_silu": "silu"}
    act = acts.get(config.hidden_act, config.hidden_act)
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.rope is None:
        return settings | {
            "model_type": "opt",
            "ffn_dim": config.intermediate_size,
            "word_embed_proj_dim": config.hidden_size,
            "activation_function": act,
        }
    settings |= {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": act,
        "rope_parameters": rope_parameters(config.rope),
    }
    windows = [bool(config.window(i)) for i in range(config.num_hidden_layers)]
    window = {
        "sliding_window": config.sliding_window or None,
        "use_sliding_window": any(windows),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }
    if config.post_norms:
        assert np.isclose(config.embedding_scale, config.hidden_size**0.5)
        return settings | {
            "model_type": "gemma3_text",
            "sliding_window": config.sliding_window,
            "layer_types": window["layer_types"],
            "hidden_activation": act,
            "rope_parameters": {
                "full_attention": rope_parameters(config.rope),
                "sliding_attention": rope_parameters(config.rope_local or config.rope),
            },
        }
    if config.qk_norm:
        return settings | window | {"model_type": "qwen3", "attention_bias": config.qkv_bias}
    if config.qkv_bias and not config.o_bias:
        return settings | window | {"model_type": "qwen2"}
    if any(windows):
        assert all(windows)
        return settings | {"model_type": "mistral", "sliding_window": config.sliding_window}
    return settings | {"model_type": "llama", "attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias}


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """A Rope as transformers 5 spells it. Explicit factors have no spelling: divide `inv_freq` afterwards."""
    if rope.scaling in ("none", "factors"):
        return {"rope_type": "default", "rope_theta": rope.theta}
    out = {"rope_type": rope.scaling, "rope_theta": rope.theta, "factor": rope.factor}
    if rope.scaling == "llama3":
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            out[key] = getattr(rope, key)
    return out


Activation = Callable[[torch.Tensor], torch.Tensor]


_BASES: dict[str, Activation] = {
    "relu": torch.relu,
    "fatrelu": torch.relu,
    "fatsilu": torch.nn.functional.silu,
    "centred_silu": torch.nn.functional.silu,
}


class Ffn(NamedTuple):
    """What a layer's FFN has of its own, by the tensors' names."""

    act_threshold: torch.Tensor
    act_centre: torch.Tensor | float = 0.0
    bypass: torch.Tensor | None = None


def _ffn(tensors: Mapping[str, torch.Tensor], at: str, threshold: torch.Tensor) -> Ffn:
    """A layer's, from tensors whose names begin so; with this threshold where none is stored."""
    stored = {name: tensors.get(f"{at}{name}.weight") for name in Ffn._fields}
    return Ffn(**{"act_threshold": threshold} | {name: value for name, value in stored.items() if value is not None})


def patch_ffn(model: Model, base: Activation, ffns: Sequence[Ffn], *, act_on_up: bool) -> None:
    """Give the FFNs of a Llama another activation, also on the up projection if asked (Bamboo).

    It is measured from the layer's centres, and zero where its absolute value is not over the layer's thresholds
    (ProSparse, 2402.13516; CATS, 2404.08763).
    """

    def forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        def act(y: torch.Tensor) -> torch.Tensor:
            y = base(y) - mlp.own.act_centre
            return torch.where(y.abs() > mlp.own.act_threshold, y, 0.0)

        up = mlp.up_proj(x)
        y = mlp.down_proj(act(mlp.gate_proj(x)) * (act(up) if act_on_up else up))
        return y if mlp.own.bypass is None else y + x @ mlp.own.bypass.T

    for layer, own in zip(model.model.layers, ffns, strict=True):
        layer.mlp.own = own
        layer.mlp.forward = types.MethodType(forward, layer.mlp)


def patch_norms(model: Model) -> None:
    """A ReLU after the norms before attention and FFN (2310.04564, stage 2)."""
    names = ("self_attn_layer_norm", "final_layer_norm"), ("input_layernorm", "pre_feedforward_layernorm")
    names = *names, ("input_layernorm", "post_attention_layernorm")
    layers = (model.model.decoder if hasattr(model.model, "decoder") else model.model).layers
    for layer in layers:
        pair = next(pair for pair in names if all(hasattr(layer, name) for name in pair))
        for name in pair:
            getattr(layer, name).register_forward_hook(lambda _module, _inputs, output: torch.relu(output))
