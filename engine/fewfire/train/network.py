"""The forward pass of `reference.py` in torch, so that it can be differentiated: batches of windows of equal length.

Parameters carry canonical names ("layers.3.gate.weight"). Each layer's `activation` is a module of its own, which a
method replaces; `norm_activation` comes after its two norms.
Knows nothing of losses, sparsity and files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewfire.checkpoint import Checkpoint
from fewfire.config import CENTRED, THRESHOLDED, ModelConfig, Rope
from fewfire.progress import Progress, silent
from fewfire.train.activations import Cut, Plain


class LayerState(NamedTuple):
    """What a layer computed for B windows of T tokens, as `Network.hidden` shows it to an observer."""

    gate: Tensor  # (B, T, neurons) act(gate x)
    up: Tensor | None  # (B, T, neurons) what gate is multiplied with, None where the model has no up matrix
    fired: Tensor  # (B, T, neurons) input of down
    ffn: Tensor  # (B, T, hidden) output of the FFN, as it is added to the residual stream
    out: Tensor  # (B, T, hidden) the residual stream after the layer


#: What an activation's tensors are called in a checkpoint and here.
_OF_ACTIVATIONS = {"act_threshold.weight": "activation.least", "act_centre.weight": "activation.centre"}
Observer = Callable[[int, LayerState], None]


class Norm(nn.Module):
    """RMS norm (1910.07467), or layer norm, over the hidden dimension."""

    def __init__(self, config: ModelConfig, size: int, plain_rms: bool = False) -> None:
        super().__init__()
        self.eps, self.centred = config.norm_eps, config.norm == "layer" and not plain_rms
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if self.centred else None

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Bypass(nn.Module):
    """A matrix that goes with the centres of a layer's neurons, and does not move."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)  # (hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Layer(nn.Module):
    """Attention and FFN, each on the normed residual stream and added to it."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        c, d, ff = config, config.hidden_size, config.intermediate_size
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.config, self.number = config, number
        self.attn_norm = Norm(c, d)
        self.q = nn.Linear(d, queries, c.qkv_bias)
        self.k = nn.Linear(d, keys, c.qkv_bias)
        self.v = nn.Linear(d, keys, c.qkv_bias)
        self.o = nn.Linear(queries, d, c.o_bias)
        self.q_norm = Norm(c, c.head_dim, plain_rms=True) if c.qk_norm else None
        self.k_norm = Norm(c, c.head_dim, plain_rms=True) if c.qk_norm else None
        self.ffn_norm = Norm(c, d)
        self.gate = nn.Linear(d, ff, c.ffn_bias)
        self.up = nn.Linear(d, ff, c.ffn_bias) if c.gated else None
        self.down = nn.Linear(ff, d, c.ffn_bias)
        self.attn_post_norm = Norm(c, d) if c.post_norms else None
        self.ffn_post_norm = Norm(c, d) if c.post_norms else None
        cut, centred = c.hidden_act in THRESHOLDED, c.hidden_act in CENTRED
        limits = torch.empty(ff), torch.empty(ff) if centred else None
        self.activation: nn.Module = Cut(c.hidden_act, *limits) if cut else Plain(c.hidden_act)
        self.bypass = Bypass(torch.empty(d, d)) if centred else None
        self.norm_activation: nn.Module = nn.ReLU() if c.norm_relu else nn.Identity()

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> LayerState:
        y = self.o(self._attention(self.norm_activation(self.attn_norm(x)), turn, mask))
        x = x + (y if self.attn_post_norm is None else self.attn_post_norm(y))
        ffn_in = self.norm_activation(self.ffn_norm(x))
        gate, up = self.activation(self.gate(ffn_in)), None if self.up is None else self.up(ffn_in)
        if up is not None and self.config.act_on_up:
            up = self.activation(up)
        fired = gate if up is None else gate * up
        y = self.down(fired)
        y = y if self.bypass is None else y + self.bypass(ffn_in)
        y = y if self.ffn_post_norm is None else self.ffn_post_norm(y)
        return LayerState(gate, up, fired, y, x + y)

    def _attention(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        B, T, c = x.shape[0], x.shape[1], self.config
        q = self.q(x).view(B, T, c.num_attention_heads, c.head_dim)
        k = self.k(x).view(B, T, c.num_key_value_heads, c.head_dim)
        v = self.v(x).view(B, T, c.num_key_value_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        group = c.num_attention_heads // c.num_key_value_heads
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=c.scale)
        return heads.transpose(1, 2).reshape(B, T, -1)


class Network(nn.Module):
    """A whole model in float32. `tensors` are those of `config.shapes()`, which it takes over without a copy."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):  # so that nothing is drawn at random only to be overwritten
            self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
            learned = config.rope is None
            positions = config.max_position_embeddings
            self.positions = nn.Embedding(positions, config.hidden_size) if learned else None
            self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
            self.final_norm = Norm(config, config.hidden_size)
            tied = config.tie_word_embeddings
            self.head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        state = {name: torch.from_numpy(np.require(tensors[name], np.float32, ["C", "W"])) for name in config.shapes()}
        self.load_state_dict({_here(name): value for name, value in state.items()}, assign=True)
        self._turns: dict[tuple[Rope, int, torch.device], tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int, torch.device], Tensor] = {}

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, progress: Progress = silent) -> Network:
        """Reads a checkpoint. Raises `CheckpointError` for a damaged one."""
        names, tensors = list(checkpoint.config.shapes()), dict[str, np.ndarray]()
        for i, name in enumerate(names):
            progress("reading the model", i, len(names))
            tensors[name] = checkpoint.read(name)
        progress("reading the model", len(names), len(names))
        return cls(checkpoint.config, tensors)

    def forward(self, ids: Tensor) -> Tensor:
        """The logits after each token of `(B, T)` ids, `(B, T, vocab_size)`."""
        return self.logits(self.hidden(ids))

    def hidden(self, ids: Tensor, observe: Observer | None = None) -> Tensor:
        """The head's inputs after each token of `(B, T)` ids, `(B, T, hidden)`; `observe` sees every layer's state."""
        x = self.start(ids)
        for number in range(self.config.num_hidden_layers):
            state = self.step(number, x)
            if observe is not None:
                observe(number, state)
            x = state.out
        return self.final_norm(x)

    def start(self, ids: Tensor) -> Tensor:
        """The residual stream before the first layer, `(B, T, hidden)`, of `(B, T)` ids."""
        c, T = self.config, ids.shape[1]
        if c.max_position_embeddings < T:
            raise ValueError(f"windows of {T} tokens are longer than the model's {c.max_position_embeddings} positions")
        x = functional.embedding(ids, self.embed.weight)
        if c.embedding_scale != 1.0:
            x = x * c.embedding_scale
        return x if self.positions is None else x + self.positions.weight[:T]

    def step(self, number: int, x: Tensor) -> LayerState:
        """What a layer makes of the residual stream before it."""
        c, T = self.config, x.shape[1]
        turn, mask = self._turn(c.layer_rope(number), T, x.device), self._mask(c.window(number), T, x.device)
        state: LayerState = self.layers[number](x, turn, mask)
        return state

    def logits(self, hidden: Tensor) -> Tensor:
        """The head alone, `(..., hidden)` -> `(..., vocab_size)`: callers hand in as few positions as they need."""
        return functional.linear(hidden, self.embed.weight if self.head is None else self.head.weight)

    def _turn(self, rope: Rope | None, T: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of RoPE's angles, each `(T, 1, head_dim / 2)`."""
        if rope is None:
            return None
        key = (rope, T, device)
        if key not in self._turns:
            frequencies = torch.from_numpy(rope.inverse_frequencies(self.config.head_dim))
            angles = (torch.arange(T, dtype=torch.float32)[:, None] * frequencies)[:, None, :].to(device)
            self._turns[key] = angles.cos(), angles.sin()
        return self._turns[key]

    def _mask(self, window: int, T: int, device: torch.device) -> Tensor | None:
        """Which keys each query sees, `(T, T)`; None where it is all up to itself."""
        if not 0 < window < T:
            return None
        key = (window, T, device)
        if key not in self._masks:
            back = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
            self._masks[key] = (back >= 0) & (back < window)
        return self._masks[key]


def of_activations(network: Network) -> dict[str, Tensor]:
    """The thresholds and centres that a network has, by canonical name."""
    found = {}
    for number, layer in enumerate(network.layers):
        part = getattr(layer.activation, "activation", layer.activation)  # behind a router
        for theirs, ours in _OF_ACTIVATIONS.items():
            value = getattr(part, ours.removeprefix("activation."), None)
            if value is not None:
                found[f"layers.{number}.{theirs}"] = value
    return found


def _here(name: str) -> str:
    """A tensor's name in a network, by its canonical one."""
    at = next((theirs for theirs in _OF_ACTIVATIONS if name.endswith(f".{theirs}")), None)
    return name if at is None else name.removesuffix(at) + _OF_ACTIVATIONS[at]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (2104.09864) in the half-split layout: `(B, T, heads, head_dim)` by angles `(T, 1, head_dim / 2)`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
