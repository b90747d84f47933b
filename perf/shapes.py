"""The shapes of well-known models, as the config.json of a ReLU Llama, and a tokenizer that fits any vocabulary."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
_LLAMA2 = {
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def _layers(count: int, hidden: int, neurons: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": count,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA3 | _layers(10, 512, 1536, 8, 2) | {"vocab_size": 32000},  # 48 M parameters, to try things out
    "llama-3.2-1b": _LLAMA3 | _layers(16, 2048, 8192, 32, 8),
    "llama-3.2-3b": _LLAMA3 | _layers(28, 3072, 8192, 24, 8),
    "llama-2-7b": _LLAMA2 | _layers(32, 4096, 11008, 32, 32),
}
BEGIN, END, MERGED = "<|begin|>", "<|end|>", ("h", "e")  # one merge, because llama.cpp refuses a file without any


def config(shape: str) -> dict[str, Any]:
    """The config.json of a shape."""
    tokens = vocabulary()
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "relu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": tokens[BEGIN],
        "eos_token_id": tokens[END],
    } | SHAPES[shape]


def vocabulary() -> dict[str, int]:
    """Tokens with their ids: bytes (as byte-level BPE spells them), one merge, begin and end."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "".join(MERGED), BEGIN, END]
    return {token: number for number, token in enumerate(tokens)}


def tokenizer_json() -> str:
    """Any text survives the round trip; the other ids of a vocabulary stand for nothing."""
    tokens = vocabulary()
    tokenizer = Tokenizer(models.BPE({t: i for t, i in tokens.items() if t not in (BEGIN, END)}, [MERGED]))
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def tokenizer_config() -> str:
    """The tokenizer_config.json beside it."""
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    return json.dumps(content, indent=2)
