"""From a packed model to kernel calls: the kernels' view of the weights, and the calls themselves.

An `Engine` is shared by all sessions of a model; a lock lets one forward pass run at a time, on all threads.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewfire import buffers
from fewfire.config import ACTIVATIONS, ModelConfig
from fewfire.kernels import attention, dense, gather, pointwise
from fewfire.kernels.decode import decode
from fewfire.kernels.dense import TOKENS
from fewfire.kernels.layer import Cache, Run, Shape, Weights
from fewfire.kernels.prefill import prefill
from fewfire.packed import Packed, table_format
from fewfire.team import Team

BATCH = 256  # tokens of a prompt that go through the layers together


@dataclass
class KVCache:
    """Keys and values of one session, bytes `(layers, kv_heads, capacity, bytes of one head)` each."""

    keys: np.ndarray
    values: np.ndarray

    @property
    def capacity(self) -> int:
        """Positions that it has room for."""
        return self.keys.shape[2]

    def grown(self, capacity: int, used: int) -> KVCache:
        """A larger copy; only the first `used` positions matter."""
        layers, heads, _, width = self.keys.shape
        copies = [np.zeros((layers, heads, capacity, width), np.uint8) for _ in range(2)]
        for copy, old in zip(copies, (self.keys, self.values), strict=True):
            copy[:, :, :used] = old[:, :, :used]
        return KVCache(*copies)


class Engine:
    """Runs a packed model's forward pass."""

    def __init__(self, packed: Packed, threads: int) -> None:
        self.config = packed.config
        self._team = Team(threads)
        self._lock = threading.Lock()
        # Cached keys and values are as exact as the weights deserve.
        self._cache_format = "f32" if packed.weights in ("f32", "bf16") else "f16"
        self._run = _run(packed.weights, table_format(packed.weights), self._cache_format)
        self._shape = _shape(packed.config)
        self._weights = _weights(packed)
        self._work, self._work_owners = buffers.workspace(packed.config, threads)
        self._batch: tuple[buffers.Batch, list[buffers.Activation]] | None = None
        self._scores = np.zeros((packed.config.num_attention_heads, 0), np.float32)
        neurons = np.arange(packed.config.intermediate_size, dtype=np.int32)
        self._active = np.ascontiguousarray(np.broadcast_to(neurons, (packed.config.num_hidden_layers, neurons.size)))

    @property
    def threads(self) -> int:
        return self._team.threads

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache: float16, or float32 for f32 and bf16 weights."""
        c = self.config
        size = buffers.head_width(c) * (4 if self._cache_format == "f32" else 2)
        shape = (c.num_hidden_layers, c.num_key_value_heads, capacity, size)
        return KVCache(np.zeros(shape, np.uint8), np.zeros(shape, np.uint8))

    def decode(self, token: int, position: int, cache: KVCache) -> np.ndarray:
        """Logits `(vocab,)` float32 after one token at `position`, which is within the cache's capacity."""
        logits = np.empty(self.config.vocab_size, np.float32)
        with self._lock:
            if self._scores.shape[1] < cache.capacity + 8:
                self._scores = np.zeros((self.config.num_attention_heads, cache.capacity + 8), np.float32)
            self._team.run(
                decode, self._run, self._weights, self._shape, token, position,
                Cache(cache.keys, cache.values), self._scores, self._active, self._work, logits,
            )  # fmt: skip
        return logits

    def prefill(self, tokens: Sequence[int], position: int, cache: KVCache, all_logits: bool) -> np.ndarray:
        """Logits `(len(tokens) or 1, vocab)` after at most `BATCH` tokens from `position` on."""
        ids = np.asarray(tokens, np.int32)
        padded = -(-ids.size // TOKENS) * TOKENS
        logits = np.empty((padded if all_logits else TOKENS, self.config.vocab_size), np.float32)
        with self._lock:
            batch = self._buffers(padded, cache.capacity)
            self._team.run(
                prefill, self._run, self._weights, self._shape, ids, position,
                Cache(cache.keys, cache.values), batch, logits,
            )  # fmt: skip
        valid = logits[: logits.shape[0] - (padded - ids.size)]
        return valid if all_logits else valid[-1:]

    def _buffers(self, tokens: int, positions: int) -> buffers.Batch:
        """Buffers for a batch: those of last time if they fit, since a long prompt is many equal batches."""
        if self._batch is not None:
            last = self._batch[0]
            if last.hidden.shape[0] == tokens and last.scores.shape[1] >= positions + 8:
                return last
        self._batch = buffers.batch(self.config, self.threads, tokens, positions)
        return self._batch[0]


def _run(weights: str, table: str, cache: str) -> Run:
    """The addresses of the primitives for these formats; compiles them or takes them from the disk cache."""
    return Run(
        gather_dot=getattr(gather, f"gather_dot_{weights}").address,
        gather_axpy=getattr(gather, f"gather_axpy_{weights}").address,
        dot_tokens=getattr(dense, f"dot_tokens_{weights}").address,
        down_strip=getattr(dense, f"down_strip_{weights}").address,
        table_dot=getattr(gather, f"gather_dot_{table}").address,
        table_tokens=getattr(dense, f"dot_tokens_{table}").address,
        table_row=getattr(gather, f"read_row_{table}").address,
        attend=getattr(attention, f"attend_{cache}").address,
        remember=getattr(attention, f"remember_{cache}").address,
        rms_norm=pointwise.rms_norm.address,
        layer_norm=pointwise.layer_norm.address,
        quantize=pointwise.quantize.address,
        rotate=pointwise.rotate.address,
        activate=pointwise.activate.address,
    )


def _shape(c: ModelConfig) -> Shape:
    return Shape(
        layers=c.num_hidden_layers,
        hidden=c.hidden_size,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        neurons=c.intermediate_size,
        vocab=c.vocab_size,
        activation=ACTIVATIONS.index(c.hidden_act),
        act_threshold=float(c.act_threshold) if c.hidden_act == "fatrelu" else 0.0,
        act_on_up=c.act_on_up,
        gated=c.gated,
        eps=float(c.norm_eps),
        attention_scale=float(c.scale),
        embedding_scale=float(c.embedding_scale),
    )


_MATRICES = ("embed", "head", "qkv", "o", "gate", "updown")


def _weights(packed: Packed) -> Weights:
    c = packed.config
    arrays = {n: a.view(np.uint8) if n in _MATRICES else a for n, a in packed.arrays.items()}
    layers = range(c.num_hidden_layers)
    absent = np.zeros((0, 0), np.float32)
    absent.flags.writeable = False  # readonly is part of the type that kernels are compiled for
    kinds = [rope.inverse_frequencies(c.head_dim) for rope in (c.rope, c.rope_local or c.rope) if rope]
    longest = max(a.shape[1] for n, a in arrays.items() if n in _MATRICES)
    computed = {
        "head": arrays.get("head", arrays["embed"]),
        "frequencies": np.stack(kinds) if kinds else np.zeros((2, 0), np.float32),
        "local": np.array([int(c.rope_local is not None and c.window(i) > 0) for i in layers], np.int64),
        "window": np.array([c.window(i) for i in layers], np.int64),
        "every": np.arange(longest, dtype=np.int32),
    }
    return Weights(**{name: computed.get(name, arrays.get(name, absent)) for name in Weights._fields})
