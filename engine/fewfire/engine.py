"""From a packed model to kernel calls: the kernels' view of the weights, the buffers, and the calls themselves.

An `Engine` is shared by all sessions of a model; a lock lets one forward pass run at a time, on all threads.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewfire.config import ACTIVATIONS, ModelConfig
from fewfire.kernels.decode import NEURON_CHUNKS, Shape, Weights, Workspace, decode
from fewfire.kernels.dense import TOKENS
from fewfire.kernels.gather import Activation
from fewfire.kernels.prefill import NEURONS, Batch, prefill
from fewfire.packed import Packed
from fewfire.quantize import padded
from fewfire.team import Team

BATCH = 256  # tokens of a prompt that go through the layers together


@dataclass
class KVCache:
    """Keys and values of one session, `(layers, kv_heads, capacity, head_dim padded to 8)` each."""

    keys: np.ndarray
    values: np.ndarray

    @property
    def capacity(self) -> int:
        """Positions that it has room for."""
        return self.keys.shape[2]

    def grown(self, capacity: int, used: int) -> KVCache:
        """A larger copy; only the first `used` positions matter."""
        layers, heads, _, width = self.keys.shape
        copies = [np.zeros((layers, heads, capacity, width), self.keys.dtype) for _ in range(2)]
        for copy, old in zip(copies, (self.keys, self.values), strict=True):
            copy[:, :, :used] = old[:, :, :used]
        return KVCache(*copies)


class Engine:
    """Runs a packed model's forward pass."""

    def __init__(self, packed: Packed, threads: int) -> None:
        self.config = packed.config
        self._team = Team(threads)
        self._lock = threading.Lock()
        self._shape = _shape(packed.config)
        self._weights = _weights(packed)
        self._width = -(-packed.config.head_dim // 8) * 8
        # Cached keys and values are as exact as the weights deserve.
        self._cache_dtype = np.float32 if packed.weights in ("f32", "bf16") else np.uint16
        self._work = _workspace(packed.config, self._width, threads)
        self._batch: Batch | None = None
        self._scores = np.zeros((packed.config.num_attention_heads, 0), np.float32)
        neurons = np.arange(packed.config.intermediate_size, dtype=np.int32)
        self._active = np.ascontiguousarray(np.broadcast_to(neurons, (packed.config.num_hidden_layers, neurons.size)))

    @property
    def threads(self) -> int:
        return self._team.threads

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache of float16 (as uint16), or float32 for f32 and bf16 weights."""
        c = self.config
        shape = (c.num_hidden_layers, c.num_key_value_heads, capacity, self._width)
        return KVCache(np.zeros(shape, self._cache_dtype), np.zeros(shape, self._cache_dtype))

    def decode(self, token: int, position: int, cache: KVCache) -> np.ndarray:
        """Logits `(vocab,)` float32 after one token at `position`, which is within the cache's capacity."""
        logits = np.empty(self.config.vocab_size, np.float32)
        with self._lock:
            if self._scores.shape[1] < cache.capacity + 8:
                self._scores = np.zeros((self.config.num_attention_heads, cache.capacity + 8), np.float32)
            self._team.run(
                decode, self._weights, self._shape, token, position,
                cache.keys, cache.values, self._scores, self._active, self._work, logits,
            )  # fmt: skip
        return logits

    def prefill(self, tokens: Sequence[int], position: int, cache: KVCache, all_logits: bool) -> np.ndarray:
        """Logits `(len(tokens) or 1, vocab)` after at most `BATCH` tokens from `position` on."""
        ids = np.asarray(tokens, np.int32)
        first = 0 if all_logits else ids.size - 1
        rows = -(-ids.size // TOKENS) * TOKENS
        logits = np.empty((rows - first // TOKENS * TOKENS, self.config.vocab_size), np.float32)
        with self._lock:
            batch = self._batch_of(rows, cache.capacity)
            self._team.run(
                prefill, self._weights, self._shape, ids, position, cache.keys, cache.values, batch, first, logits
            )
        return logits[first % TOKENS :][: ids.size - first]

    def _batch_of(self, rows: int, capacity: int) -> Batch:
        """Buffers for a number of tokens: the ones of last time if they fit, since most prompts are of many batches."""
        last = self._batch
        if last is None or last.hidden.shape[0] != rows or last.scores.shape[1] < capacity + 8:
            self._batch = last = _batch(self.config, self._width, self.threads, rows, capacity)
        return last


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


def _weights(packed: Packed) -> Weights:
    c, arrays = packed.config, packed.arrays
    layers = range(c.num_hidden_layers)
    absent = np.zeros((0, 0), np.float32)
    absent.flags.writeable = False  # readonly is part of the type that kernels are compiled for
    kinds = [rope.inverse_frequencies(c.head_dim) for rope in (c.rope, c.rope_local or c.rope) if rope]
    computed = {
        "head": arrays.get("head", arrays["embed"]),
        "frequencies": np.stack(kinds) if kinds else np.zeros((2, 0), np.float32),
        "local": np.array([int(c.rope_local is not None and c.window(i) > 0) for i in layers], np.int64),
        "window": np.array([c.window(i) for i in layers], np.int64),
    }
    return Weights(**{name: computed.get(name, arrays.get(name, absent)) for name in Weights._fields})


def _activation(columns: int, *tokens: int) -> Activation:
    n = padded(columns)
    lanes = 8 * (n // 256 + (n // 32) % 8 // 4 + (n // 32) % 4 // 2)  # eight for each block of groups
    return Activation(
        np.zeros((*tokens, n), np.float32),
        np.zeros((*tokens, n), np.int8),
        np.zeros((*tokens, lanes), np.float32),
        np.zeros((*tokens, lanes), np.int32),
        np.zeros((*tokens, 256), np.int8),
    )


def _factors(columns: int) -> int:
    """Floats of scratch that `gather_axpy` needs: the group scales of four rows, each rounded up to eight."""
    return 4 * (-(-padded(columns) // 256) * 8)


def _workspace(c: ModelConfig, width: int, threads: int) -> Workspace:
    hidden, chunk = padded(c.hidden_size), -(-c.intermediate_size // NEURON_CHUNKS) + 8
    rope = (2, c.head_dim // 2 if c.rope else 0)
    return Workspace(
        x=_activation(c.hidden_size),
        attended=_activation(c.num_attention_heads * c.head_dim),
        hidden=np.zeros(hidden, np.float32),
        delta=np.zeros(hidden, np.float32),
        qkv=np.zeros((c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim, np.float32),
        query=np.zeros((c.num_attention_heads, width), np.float32),
        key=np.zeros(width, np.float32),
        context=np.zeros((c.num_attention_heads, width), np.float32),
        gate=np.zeros((threads, chunk), np.float32),
        up=np.zeros((threads, chunk), np.float32),
        partial=np.zeros((NEURON_CHUNKS, hidden), np.float32),
        factors=np.zeros((threads, _factors(c.hidden_size)), np.float32),
        cos=np.zeros(rope, np.float32),
        sin=np.zeros(rope, np.float32),
    )


def _batch(c: ModelConfig, width: int, threads: int, rows: int, capacity: int) -> Batch:
    hidden = padded(c.hidden_size)
    rope = (threads, 2, c.head_dim // 2 if c.rope else 0)
    return Batch(
        x=_activation(c.hidden_size, rows),
        attended=_activation(c.num_attention_heads * c.head_dim, rows),
        hidden=np.zeros((rows, hidden), np.float32),
        delta=np.zeros((rows, hidden), np.float32),
        qkv=np.zeros((rows, (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim), np.float32),
        query=np.zeros((rows, c.num_attention_heads, width), np.float32),
        fired=np.zeros((rows, c.intermediate_size), np.float32),
        gate=np.zeros((threads, rows, NEURONS), np.float32),
        up=np.zeros((threads, rows, NEURONS), np.float32),
        panel=np.zeros((threads, 64 * 64), np.float32),
        key=np.zeros((threads, width), np.float32),
        context=np.zeros((threads, width), np.float32),
        scores=np.zeros((threads, capacity + 8), np.float32),
        cos=np.zeros(rope, np.float32),
        sin=np.zeros(rope, np.float32),
    )
