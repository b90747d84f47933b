"""The whole forward pass in plain NumPy float32: the oracle that the compiled engine is tested against.

Promises the logits of every model that a `ModelConfig` can describe, over a prompt at once or continuing from
a cache, with nothing clever in between: each formula is here once, in the order in which the papers state it.
Knows nothing of files, quantisation, threads or sparsity, and is as slow as that sounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fewfire.config import CENTRED, THRESHOLDED, ModelConfig, Rope

Tensors = Mapping[str, np.ndarray]


@dataclass
class ReferenceCache:
    """Keys (after RoPE) and values of all positions so far, per layer `(positions, n_kv_heads, head_dim)`."""

    keys: dict[int, np.ndarray] = field(default_factory=dict)
    values: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """How many positions are in it."""
        return len(self.keys[0]) if self.keys else 0

    def extend(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append the new positions' keys and values; return those of all positions."""
        if layer in self.keys:
            k, v = np.concatenate([self.keys[layer], k]), np.concatenate([self.values[layer], v])
        self.keys[layer], self.values[layer] = k, v
        return k, v


def forward(
    config: ModelConfig, tensors: Tensors, tokens: Sequence[int], cache: ReferenceCache | None = None
) -> np.ndarray:
    """The logits after each of `tokens`, `(T, vocab_size)`; with a cache, continuing what is in it."""
    cache = ReferenceCache() if cache is None else cache
    ids = np.asarray(tokens, dtype=np.int64)
    positions = np.arange(cache.length, cache.length + len(ids))  # (T,)
    if len(ids) == 0:
        raise ValueError("no tokens: the forward pass needs at least one")
    if positions[-1] >= config.max_position_embeddings:
        raise ValueError(f"position {positions[-1]} is past the model's {config.max_position_embeddings}")

    x = embedded(config, tensors, ids, positions)
    for i in range(config.num_hidden_layers):
        x = block(config, tensors, i, x, positions, cache).out
    x = normed(config, tensors, "final_norm", x)
    return x @ tensors["embed.weight" if config.tie_word_embeddings else "head.weight"].T


def embedded(config: ModelConfig, tensors: Tensors, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What the first layer gets, `(T, hidden)`."""
    x = tensors["embed.weight"][ids].astype(np.float32) * np.float32(config.embedding_scale)
    return x if config.rope is not None else x + tensors["positions.weight"][positions]


class Block(NamedTuple):
    """All that one layer computes for T tokens."""

    attn_in: np.ndarray  # (T, hidden) normed input of q, k and v
    joined: np.ndarray  # (T, n_heads * head_dim) the heads side by side, input of o
    residual: np.ndarray  # (T, hidden) after attention
    ffn_in: np.ndarray  # (T, hidden) normed input of gate and up
    gate: np.ndarray  # (T, intermediate) act(gate x)
    up: np.ndarray | None  # (T, intermediate) what gate is multiplied with, None if there is no up matrix
    fired: np.ndarray  # (T, intermediate) input of down
    out: np.ndarray  # (T, hidden) input of the next layer


def block(
    config: ModelConfig, tensors: Tensors, layer: int, x: np.ndarray, positions: np.ndarray, cache: ReferenceCache
) -> Block:
    """One layer: attention and FFN, each on the normed residual stream and added to it."""
    at = f"layers.{layer}."
    attn_in = normed_input(config, tensors, at + "attn_norm", x)
    joined = attention(config, tensors, layer, attn_in, positions, cache)
    y = linear(tensors, at + "o", joined)
    if config.post_norms:
        y = normed(config, tensors, at + "attn_post_norm", y)
    residual = x + y
    ffn_in = normed_input(config, tensors, at + "ffn_norm", residual)
    gate, up = neurons(config, tensors, layer, ffn_in)
    fired = gate if up is None else gate * up
    y = linear(tensors, at + "down", fired)
    if config.hidden_act in CENTRED:
        y = y + linear(tensors, at + "bypass", ffn_in)
    if config.post_norms:
        y = normed(config, tensors, at + "ffn_post_norm", y)
    return Block(attn_in, joined, residual, ffn_in, gate, up, fired, residual + y)


def attention(
    config: ModelConfig,
    tensors: Tensors,
    layer: int,
    x: np.ndarray,
    positions: np.ndarray,
    cache: ReferenceCache,
) -> np.ndarray:
    """Causal grouped-query attention of the new positions to all positions so far, `(T, n_heads * head_dim)`."""
    at, T, head_dim = f"layers.{layer}.", len(x), config.head_dim
    q = linear(tensors, at + "q", x).reshape(T, config.num_attention_heads, head_dim)
    k = linear(tensors, at + "k", x).reshape(T, config.num_key_value_heads, head_dim)
    v = linear(tensors, at + "v", x).reshape(T, config.num_key_value_heads, head_dim)
    if config.qk_norm:
        q = rms_norm(q, tensors[at + "q_norm.weight"], config.norm_eps)
        k = rms_norm(k, tensors[at + "k_norm.weight"], config.norm_eps)
    if rope := config.layer_rope(layer):
        q, k = rotate(q, positions, rope), rotate(k, positions, rope)
    k, v = cache.extend(layer, k, v)  # (S, n_kv_heads, head_dim)

    group = config.num_attention_heads // config.num_key_value_heads  # query heads g*group.. share kv head g
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # (S, n_heads, head_dim)
    q = q * np.float32(config.scale)
    scores = np.matmul(q.transpose(1, 0, 2), k.transpose(1, 2, 0))  # (n_heads, T, S)
    back = positions[:, None] - np.arange(len(k))[None, :]  # how far behind the query each key is
    visible = back >= 0
    if window := config.window(layer):
        visible &= back < window
    weights = softmax(np.where(visible, scores, np.float32(-np.inf)))
    heads = np.matmul(weights, v.transpose(1, 0, 2))  # (n_heads, T, head_dim)
    return heads.transpose(1, 0, 2).reshape(T, -1)


def neurons(config: ModelConfig, tensors: Tensors, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The two factors of what each neuron fires with, `(T, intermediate)`; the second only where there is an up matrix.

    Neuron i is row i of gate and up and column i of down.
    """
    at = f"layers.{layer}."
    threshold, centre = tensors.get(at + "act_threshold.weight"), tensors.get(at + "act_centre.weight")
    gate = activate(config, linear(tensors, at + "gate", x), threshold, centre)
    if not config.gated:
        return gate, None
    up = linear(tensors, at + "up", x)
    return gate, activate(config, up, threshold) if config.act_on_up else up


def activate(
    config: ModelConfig, x: np.ndarray, threshold: np.ndarray | None = None, centre: np.ndarray | None = None
) -> np.ndarray:
    """The activation function of the FFN, less the neuron's centre, zero where what is left is not over its threshold.

    Over it in absolute value; the models that have neither are the usual ones.
    """
    y = _plain_activation(config, x) - (np.float32(0) if centre is None else centre)
    return y if threshold is None else np.where(np.abs(y) <= threshold, np.float32(0), y)


def _plain_activation(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    match THRESHOLDED.get(config.hidden_act, config.hidden_act):
        case "silu":
            return x / (1 + np.exp(-np.maximum(x, -80)))  # below -80 it is all but 0, and exp would overflow
        case "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3)))
        case "relu":
            return np.maximum(x, 0)
        case _:  # relu2
            return np.maximum(x, 0) ** 2


def linear(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    """`W x`, plus the bias if the layer has one."""
    y = x @ tensors[name + ".weight"].T
    bias = tensors.get(name + ".bias")
    return y if bias is None else y + bias


def normed(config: ModelConfig, tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    """The family's normalisation over the hidden dimension."""
    if config.norm == "rms":
        return rms_norm(x, tensors[name + ".weight"], config.norm_eps)
    x = x - x.mean(axis=-1, keepdims=True)
    return rms_norm(x, tensors[name + ".weight"], config.norm_eps) + tensors[name + ".bias"]


def normed_input(config: ModelConfig, tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    """What q, k and v, or gate and up, are multiplied with."""
    y = normed(config, tensors, name, x)
    return np.maximum(y, 0) if config.norm_relu else y


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """`x` over the root of its mean square, times the weight (1910.07467)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def rotate(x: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    """RoPE (2104.09864): turns the pair (j, j + head_dim / 2) of each head by position * frequency j."""
    angles = positions[:, None].astype(np.float32) * rope.inverse_frequencies(x.shape[-1])
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]  # (T, 1, head_dim / 2)
    a, b = np.split(x, 2, axis=-1)  # x: (T, heads, head_dim)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis; shifted by the maximum so that it cannot overflow."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
