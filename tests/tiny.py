"""Tiny random models of every supported family, in the Hugging Face layout, made without torch.

`write_tiny("qwen3", directory)` writes config.json, model.safetensors, tokenizer.json and
tokenizer_config.json (with a chat template) as the real checkpoints have them: their names, their spelling,
their quirks. The weights depend on the seed, the tensor's name and its shape alone, and are scaled so that
every part shows in the logits (spread 1 to 3): norm weights are not 1, biases not 0, attention is not flat,
windows are shorter than the prompt.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Dtype = Literal["f32", "f16", "bf16"]

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
VOCAB_SIZE = 300
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARAGRAPH = """The first thing one notices about the lighthouse is that nobody is in it. The lamp turns,
the log is written up every evening, and the kettle on the stove is warm, but the keeper is always
somewhere else: on the rocks, in the boat, behind the hill. Visitors write their names in the book and
leave. In winter the book is shut, and then the only things written in it are the wind, the height of the
water and the hours of the lamp."""

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 12,
    "use_sliding_window": False,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
}
# What each family's config.json has besides the shapes.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama-tied": _LLAMA | {"tie_word_embeddings": True},
    "llama-bias": _LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama-linear": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-llama3": _LLAMA | {"rope_theta": 500000.0, "rope_scaling": _LLAMA3},
    "llama-v5": {k: v for k, v in _LLAMA.items() if not k.startswith("rope")}  # as transformers 5 writes it
    | {"rope_parameters": {"rope_theta": 500000.0} | _LLAMA3},
    "llama-relu": _LLAMA | {"hidden_act": "relu"},
    "llama-relu2": _LLAMA | {"hidden_act": "relu2"},
    "llama-fatsilu": _LLAMA | {"hidden_act": "fatsilu"},  # with thresholds of its own for each neuron
    "llama-centred": _LLAMA | {"hidden_act": "centred_silu"},  # with centres and a bypass as well
    "llama-norm-relu": _LLAMA | {"hidden_act": "relu", "norm_relu": True},
    "sparsellama": _LLAMA
    | {
        "architectures": ["SparseLlamaForCausalLM"],
        "model_type": "sparsellama",
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.2,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 12,
        "tie_word_embeddings": False,
    },
    "bamboo": {
        "architectures": ["BambooForCausalLM"],
        "model_type": "bamboo",
        "hidden_act": "relu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen2": _QWEN2,
    "qwen2-sliding": _QWEN2 | {"use_sliding_window": True, "tie_word_embeddings": False},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 16,  # always said: its default is 128
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "query_pre_attn_scalar": 24,
        "head_dim": 32,
        "sliding_window": 12,
        "sliding_window_pattern": 2,
        "attention_bias": False,
    },
    "opt": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
        "dropout": 0.1,
    },
}
FAMILIES = tuple(_FAMILIES)
TIED_BY_DEFAULT = ("gemma", "opt")  # their config.json does not mention it


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """The config.json of a family. An override of None removes the key."""
    shapes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
    }
    config: dict[str, Any] = shapes | _FAMILIES[family] | overrides
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32"}
    if config["model_type"] == "opt":
        # OPT has no grouped queries, no free head size, and its own word for the FFN's width
        config = {k: v for k, v in config.items() if k not in ("num_key_value_heads", "head_dim")}
        config["ffn_dim"] = config.pop("intermediate_size")
        config["word_embed_proj_dim"] = config["hidden_size"]
    return {key: value for key, value in config.items() if value is not None or key not in overrides}


def tiny_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint under its Hugging Face name."""
    kind, d, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads", heads), config.get("head_dim", d // heads)
    opt, gemma = kind == "opt", kind == "gemma3_text"
    ff = config["ffn_dim"] if opt else config["intermediate_size"]
    root = "model.decoder." if opt else "model."

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{root}{name}.weight", (rows, columns)
        if bias:
            yield f"{root}{name}.bias", (rows,)

    def norm(name: str, size: int = d) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{root}{name}.weight", (size,)
        if opt:
            yield f"{root}{name}.bias", (size,)

    yield f"{root}embed_tokens.weight", (config["vocab_size"], d)
    if opt:
        yield f"{root}embed_positions.weight", (config["max_position_embeddings"] + 2, d)
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        bias = config.get("attention_bias", False) or kind in ("opt", "qwen2")
        yield from norm(at + ("self_attn_layer_norm" if opt else "input_layernorm"))
        yield from linear(at + "self_attn.q_proj", heads * head_dim, d, bias)
        yield from linear(at + "self_attn.k_proj", kv_heads * head_dim, d, bias)
        yield from linear(at + "self_attn.v_proj", kv_heads * head_dim, d, bias)
        yield from linear(
            at + ("self_attn.out_proj" if opt else "self_attn.o_proj"),
            d,
            heads * head_dim,
            bias and kind != "qwen2",
        )
        if kind in ("qwen3", "gemma3_text"):
            yield from norm(at + "self_attn.q_norm", head_dim)
            yield from norm(at + "self_attn.k_norm", head_dim)
        yield from norm(at + ("final_layer_norm" if opt else "post_attention_layernorm"))
        if gemma:
            yield from norm(at + "pre_feedforward_layernorm")
            yield from norm(at + "post_feedforward_layernorm")
        if opt:
            yield from linear(at + "fc1", ff, d, True)
            yield from linear(at + "fc2", d, ff, True)
        else:
            for name, rows, columns in (("gate", ff, d), ("up", ff, d), ("down", d, ff)):
                yield from linear(f"{at}mlp.{name}_proj", rows, columns, config.get("mlp_bias", False))
        act = config.get("hidden_act", "")
        if act.startswith(("fat", "centred")) and "hidden_act_param" not in config:
            yield f"{root}{at}mlp.act_threshold.weight", (ff,)
        if act.startswith("centred"):
            yield f"{root}{at}mlp.act_centre.weight", (ff,)
            yield from linear(at + "mlp.bypass", d, d)
    yield from norm("final_layer_norm" if opt else "norm")
    if not config.get("tie_word_embeddings", kind.startswith(TIED_BY_DEFAULT)):
        yield "lm_head.weight", (config["vocab_size"], d)


def tiny_tensor(config: dict[str, Any], name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The float32 values of one tensor."""
    # RandomState and not a Generator: NumPy has frozen its stream, and the goldens depend on it
    random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    values = random.standard_normal(shape).astype(np.float32)
    if name.endswith("act_threshold.weight"):
        return np.abs(values) * np.float32(0.18)
    if name.endswith("act_centre.weight"):
        return values * np.float32(0.06) - np.float32(0.1)
    if name.endswith(".bias"):
        return values * np.float32(0.3)
    if "norm" in name:  # Gemma stores the weight minus 1
        return values * np.float32(0.3) + np.float32(config["model_type"] != "gemma3_text")
    if "embed" in name or "lm_head" in name:
        return values * np.float32(2 / shape[-1] ** 0.5)
    gain = 1.6 if "q_proj" in name or "k_proj" in name else 1.0  # so that attention picks
    return values * np.float32(gain / shape[-1] ** 0.5)


@functools.cache
def tiny_tokenizer() -> str:
    """tokenizer.json of a byte-level BPE trained on one paragraph: any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PARAGRAPH], trainer)
    return tokenizer.to_str()


def prompt(length: int = 64, *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> list[int]:
    """Random token ids, none of them special."""
    random = np.random.RandomState(seed)
    return [int(i) for i in random.randint(len(SPECIALS), vocab_size, size=length)]


def write_tiny(
    family: str, directory: Path, *, dtype: Dtype = "f32", shards: int = 1, seed: int = 0, **overrides: Any
) -> Path:
    """Write a tiny model of `family` (one of FAMILIES) into `directory`; overrides are keys of config.json.

    The shapes are spelled alike for every family (`intermediate_size` also for OPT). Returns the directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, **overrides)
    tensors = {name: tiny_tensor(config, name, shape, seed) for name, shape in tiny_shapes(config)}

    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i, part in enumerate(np.array_split(np.arange(len(names)), shards), start=1):
        file = "model.safetensors" if shards == 1 else f"model-{i:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys((names[j] for j in part), file)
        write_safetensors(directory / file, {names[j]: tensors[names[j]] for j in part}, dtype)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 0]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHATML,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    (directory / "tokenizer.json").write_text(tiny_tokenizer(), encoding="utf-8")
    return directory


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: Dtype = "f32") -> None:
    """A safetensors file by hand, because the library cannot write bf16 without torch."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, at = [], 0
    for name, values in tensors.items():
        blob = encode(values, dtype)
        header[name] = {"dtype": dtype.upper(), "shape": values.shape, "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def encode(values: np.ndarray, dtype: Dtype) -> bytes:
    """Little-endian bytes of finite float32 values in a checkpoint's type, rounded to nearest even."""
    if dtype == "f32":
        return values.astype("<f4").tobytes()
    if dtype == "f16":
        return values.astype("<f2").tobytes()
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
