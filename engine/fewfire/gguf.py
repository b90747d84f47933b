"""A .gguf file as a `Checkpoint`: configuration, weights, tokenizer and chat template from one file.

Promises canonical tensors in any number format that the gguf package can dequantise. What llama.cpp changes
when it converts a model is undone here: the permuted q and k of the llama architecture. Gemma's norms
already have their 1 added in GGUF. Knows nothing of the file's bytes (`gguffile.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fewfire import gguffile
from fewfire.checkpoint import END_OF_TURN, check_shapes, finite, row_range
from fewfire.config import ModelConfig, Rope
from fewfire.errors import CheckpointError
from fewfire.families import (
    MAX_CONTEXT,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    canonical_to,
    check_heads,
    embedding_scale,
)
from fewfire.fields import Fields, unique
from fewfire.tokenizer_build import Vocabulary, build_tokenizer, special_tokens, starts_with_bos

NAMES = {
    "embed": "token_embd",
    "attn_norm": "blk.{}.attn_norm",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "o": "blk.{}.attn_output",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "ffn_norm": "blk.{}.ffn_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
    "attn_post_norm": "blk.{}.post_attention_norm",
    "ffn_post_norm": "blk.{}.post_ffw_norm",
    "final_norm": "output_norm",
    "head": "output",
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Arch:
    """What is particular to one of llama.cpp's architectures. The rest is in the metadata and the tensors."""

    name: str
    permuted: bool = False  # q and k rows are in the order of the original RoPE
    qk_norm: bool = False
    gemma: bool = False


ARCHITECTURES = {
    "llama": Arch("Llama", permuted=True),
    "qwen2": Arch("Qwen2"),
    "qwen3": Arch("Qwen3", qk_norm=True),
    "gemma3": Arch("Gemma 3", qk_norm=True, gemma=True),
}


class GGUFCheckpoint:
    """See `fewfire.checkpoint.Checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = gguffile.read_header(path)
        self._metadata = header.metadata
        self._tensors = header.tensors
        self.config, self._arch = _read_config(Fields(header.metadata, str(path)), header.tensors)
        self._names = {name: canonical_to(NAMES, name) for name in self.config.shapes()}
        found = {name: t.shape for name, stored in self._names.items() if (t := self._tensors.get(stored))}
        check_shapes(self.config, found, path)
        for kind, stored in {self._tensors[stored].kind: stored for stored in self._names.values()}.items():
            if not gguffile.can_dequantize(kind):
                raise CheckpointError(
                    f"{path}: tensor {stored} has the format {kind.name}, which cannot be read; use another"
                )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Checkpoint.read`."""
        tensor = self._tensors[self._names[name]]
        start, stop = row_range(name, tensor.shape[0], start, stop)
        part = name.split(".")[2] if name.startswith("layers.") else name
        if self._arch.permuted and part in ("q", "k"):
            rows = self._read_permuted(tensor, start, stop)
        else:
            rows = gguffile.read_rows(tensor, start, stop)
        return finite(rows, name, self.path)

    def tokenizer_json(self) -> str:
        """See `Checkpoint.tokenizer_json`. Built from the metadata; takes seconds for a large vocabulary."""
        return build_tokenizer(_vocabulary(Fields(self._metadata, str(self.path)), self.config.vocab_size))

    def chat_template(self) -> str | None:
        """See `Checkpoint.chat_template`."""
        template = self._metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def _read_permuted(self, tensor: gguffile.GGUFTensor, start: int, stop: int) -> np.ndarray:
        """Rows of q or k in half-split order: the file has rows i and i + head_dim / 2 of a head together."""
        dim = self.config.head_dim
        wanted = np.arange(start, stop)
        first, last = start // dim * dim, -(-stop // dim) * dim  # whole heads
        head, within = wanted // dim * dim, wanted % dim
        stored = head + within % (dim // 2) * 2 + within // (dim // 2)
        return gguffile.read_rows(tensor, first, last)[stored - first]


def _read_config(fields: Fields, tensors: Mapping[str, gguffile.GGUFTensor]) -> tuple[ModelConfig, Arch]:
    """The configuration, from the metadata and, for what it does not say, from the tensors."""
    kind = fields.text("general.architecture")
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{fields.where}: architecture {kind[:40]!r} is not supported in GGUF; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    arch = ARCHITECTURES[kind]
    if fields.whole("split.count", 0, 1 << 16, default=1) > 1:
        raise CheckpointError(f"{fields.where}: one part of a split GGUF; join it with llama-gguf-split --merge")
    if fields.whole(f"{kind}.expert_count", 0, 1 << 16, default=0):
        raise CheckpointError(f"{fields.where}: mixture-of-experts models ({kind}.expert_count) are not supported")
    embedding = tensors.get(NAMES["embed"] + ".weight")
    hidden = fields.whole(f"{kind}.embedding_length", 1, MAX_WIDTH)
    layers = fields.whole(f"{kind}.block_count", 1, MAX_LAYERS)
    heads = fields.whole(f"{kind}.attention.head_count", 1, MAX_HEADS)
    vocab = embedding.shape[0] if embedding else fields.whole(f"{kind}.vocab_size", 1, MAX_VOCAB)
    if not 1 <= vocab <= MAX_VOCAB:
        raise CheckpointError(f"{fields.where}: tensor token_embd.weight has {vocab} rows: the header is damaged")
    head_dim = fields.whole(f"{kind}.attention.key_length", 1, MAX_HEAD_DIM, default=max(1, hidden // heads))
    if fields.whole(f"{kind}.attention.value_length", 1, MAX_HEAD_DIM, default=head_dim) != head_dim:
        raise fields.error(f"{kind}.attention.value_length", f"the same as key_length, {head_dim}")
    if fields.whole(f"{kind}.rope.dimension_count", 1, MAX_HEAD_DIM, default=head_dim) != head_dim:
        raise fields.error(f"{kind}.rope.dimension_count", f"{head_dim} (partial RoPE is not supported)")
    qkv_bias = "blk.0.attn_q.bias" in tensors
    config = ModelConfig(
        architecture=arch.name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.whole(f"{kind}.feed_forward_length", 1, MAX_WIDTH),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.whole(f"{kind}.attention.head_count_kv", 1, MAX_HEADS, default=heads),
        head_dim=head_dim,
        max_position_embeddings=fields.whole(f"{kind}.context_length", 1, MAX_CONTEXT),
        norm_eps=fields.number(f"{kind}.attention.layer_norm_rms_epsilon", 0, 1),
        qkv_bias=qkv_bias,
        o_bias="blk.0.attn_output.bias" in tensors,
        ffn_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=arch.qk_norm,
        tie_word_embeddings="output.weight" not in tensors,
        rope=_rope(fields, kind, head_dim, tensors.get(_ROPE_FACTORS)),
    )
    window = fields.whole(f"{kind}.attention.sliding_window", 0, MAX_CONTEXT, default=0)
    if arch.gemma:
        config = _gemma(fields, config, kind, window)
    elif window:
        config = replace(config, sliding_window=window, sliding_layers=(True,) * layers)
    check_heads(config, fields, f"{kind}.attention.head_count_kv", f"{kind}.attention.key_length")
    return _with_tokens(fields, config), arch


def _gemma(fields: Fields, config: ModelConfig, kind: str, window: int) -> ModelConfig:
    """Gemma 3, with the constants that llama.cpp has in its code and not in the file."""
    for name in (f"{kind}.attn_logit_softcapping", f"{kind}.final_logit_softcapping"):
        if fields.number(name, 0, 1e9, default=0):
            raise fields.error(name, "0 (softcapping is not supported)")
    layers = config.num_hidden_layers
    name = f"{kind}.attention.sliding_window_pattern"
    if name in fields and not isinstance(fields.data[name], int):
        sliding = tuple(bool(layer) for layer in fields.items(name, layers) or ())
    else:
        pattern = fields.whole(name, 1, MAX_LAYERS, default=6)
        sliding = tuple((i + 1) % pattern != 0 for i in range(layers))
    # The 27B model alone has query_pre_attn_scalar = hidden_size / heads instead of head_dim.
    scalar = config.hidden_size / config.num_attention_heads if layers == 62 else config.head_dim
    return replace(
        config,
        hidden_act="gelu_tanh",
        post_norms=True,
        attention_scale=scalar**-0.5,
        embedding_scale=embedding_scale(config.hidden_size),
        sliding_window=window,
        sliding_layers=sliding if window else (),
        rope_local=Rope(fields.number(f"{kind}.rope.freq_base_swa", 1, 1e12, default=10_000)),
    )


def _rope(fields: Fields, kind: str, head_dim: int, factors: gguffile.GGUFTensor | None) -> Rope:
    """RoPE: llama3 scaling comes as one factor per frequency, in a tensor."""
    default = 1e6 if kind == "gemma3" else 10_000
    theta = fields.number(f"{kind}.rope.freq_base", 1, 1e12, default=default)
    scaling = fields.text(f"{kind}.rope.scaling.type", default="none")
    factor = fields.number(f"{kind}.rope.scale_linear", 0, 1e6, default=1) or 1.0
    if scaling == "linear":
        factor = fields.number(f"{kind}.rope.scaling.factor", 0, 1e6, default=factor) or 1.0
    elif scaling != "none":
        raise CheckpointError(
            f"{fields.where}: RoPE scaling {scaling[:40]!r} is not supported; supported: none, linear, rope_freqs"
        )
    if factors is not None:
        if factors.shape != (head_dim // 2,):
            raise CheckpointError(
                f"{fields.where}: tensor {_ROPE_FACTORS} has shape {factors.shape}, not {head_dim // 2}"
            )
        values = gguffile.read_rows(factors, 0, head_dim // 2) * np.float32(factor)
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise CheckpointError(f"{fields.where}: tensor {_ROPE_FACTORS} is damaged: its factors must be positive")
        return Rope(theta, "factors", factors=tuple(float(v) for v in values))
    return Rope(theta, "linear", factor=factor) if factor != 1 else Rope(theta)


def _with_tokens(fields: Fields, config: ModelConfig) -> ModelConfig:
    """Begin and end tokens, of the tokenizer's entries and by name."""
    at = "tokenizer.ggml."
    vocab = config.vocab_size
    bos = next(iter(fields.ids(at + "bos_token_id", vocab)), None)
    ends = [i for name in ("eos", "eot", "eom") for i in fields.ids(f"{at}{name}_token_id", vocab)]
    tokens, types = fields.data.get(at + "tokens"), fields.data.get(at + "token_type")
    if isinstance(tokens, list) and isinstance(types, np.ndarray):
        special = special_tokens(tokens, types)
        ends += [special[name] for name in END_OF_TURN if special.get(name, vocab) < vocab]
    default = starts_with_bos(fields.text(at + "model", ""), fields.text(at + "pre", "default"))
    add = fields.flag(at + "add_bos_token", default) and bos is not None
    return replace(config, bos_token_id=bos, eos_token_ids=unique(ends), add_bos_token=add)


def _vocabulary(fields: Fields, rows: int) -> Vocabulary:
    """The tokenizer's part of the metadata, its types checked."""
    at = "tokenizer.ggml."
    where = fields.where

    def strings(name: str) -> list[str]:
        value: Any = fields.data.get(at + name)
        if value is None and name == "merges":
            return []
        if not isinstance(value, list):
            raise CheckpointError(f"{where}: {at}{name} is missing: the file has no tokenizer; use a complete GGUF")
        return value

    def numbers(name: str) -> np.ndarray | None:
        value = fields.data.get(at + name)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != len(tokens):
            raise fields.error(at + name, f"a list of {len(tokens)} numbers")
        return value

    tokens = strings("tokens")
    if len(tokens) > rows:
        raise CheckpointError(f"{where}: {len(tokens)} tokens, but the embedding has only {rows} rows")
    unknown = fields.ids(at + "unknown_token_id", max(1, len(tokens)))
    return Vocabulary(
        where=where,
        model=fields.text(at + "model"),
        pre=fields.text(at + "pre", "default"),
        tokens=tokens,
        types=numbers("token_type"),
        scores=numbers("scores"),
        merges=strings("merges"),
        unknown=unknown[0] if unknown else None,
        space_prefix=fields.flag(at + "add_space_prefix", True),
    )
