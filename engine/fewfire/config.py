"""What a model is, apart from its weights: one `ModelConfig` for every supported family.

The forward pass knows no family names; it reads only the fields below. What a family's checkpoint calls
things, and which of its options are supported, is the business of `families.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Activation = Literal["silu", "gelu_tanh", "relu", "relu2", "fatrelu", "fatsilu", "centred_silu"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "relu", "relu2", "fatrelu", "fatsilu", "centred_silu")
#: Zero for most of what they see.
EXACT_ZEROS: tuple[Activation, ...] = ("relu", "relu2", "fatrelu", "fatsilu", "centred_silu")
#: Activations with a threshold for each neuron, which is a weight of the model: what they keep, they take from another
#: one, and only where its absolute value is over the threshold (ProSparse, 2402.13516; CATS, 2404.08763).
THRESHOLDED: dict[Activation, Activation] = {"fatrelu": "relu", "fatsilu": "silu", "centred_silu": "silu"}
#: Of these, those that are measured from a centre of each neuron: h = cut(act(gate x) - centre) * up x, where a SiLU
#: that idles is near its centre and not near zero. What the centres give, down (centre * up x), is linear in x: it is
#: a matrix of its own, `bypass`, that every token reads.
CENTRED: tuple[Activation, ...] = ("centred_silu",)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (2104.09864), in the half-split layout of transformers.

    `scaling` is "none", "linear" (divide every frequency by `factor`), "llama3" (the four numbers of Llama 3.1)
    or "factors" (divide frequency i by `factors[i]`, which is how GGUF stores llama3 scaling).
    """

    theta: float
    scaling: Literal["none", "linear", "llama3", "factors"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, `(head_dim // 2,)` float32."""
        inv = 1.0 / self.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.scaling == "linear":
            inv = inv / self.factor
        elif self.scaling == "factors":
            inv = inv / np.asarray(self.factors, dtype=np.float64)
        elif self.scaling == "llama3":
            wavelength = 2 * np.pi / inv
            rotations = self.original_max_position_embeddings / wavelength
            smooth = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            smooth = np.clip(smooth, 0.0, 1.0)
            inv = inv * smooth + inv / self.factor * (1 - smooth)
        return inv.astype(np.float32)


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder-only transformer. Names follow the checkpoints' config.json."""

    architecture: str  # for people; nothing computes with it
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    hidden_act: Activation = "silu"
    gated: bool = True  # False: h = act(gate x), there is no up matrix (OPT)
    act_on_up: bool = False  # True: h = act(gate x) * act(up x) (Bamboo, TurboSparse 2406.05955)
    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head's q and k before RoPE (Qwen3, Gemma 3)
    norm_relu: bool = False  # ReLU after the norms before q, k, v and before gate, up (2310.04564, stage 2)
    post_norms: bool = False  # norms on the outputs of attention and FFN as well (Gemma's sandwich)
    attention_scale: float = 0.0  # 0 means head_dim ** -0.5
    embedding_scale: float = 1.0
    tie_word_embeddings: bool = False

    rope: Rope | None = None  # None: learned positions (OPT)
    rope_local: Rope | None = None  # for sliding layers, where it differs (Gemma 3)
    sliding_window: int = 0  # 0: none; else a key is seen from the query's own position back to window - 1 before it
    sliding_layers: tuple[bool, ...] = ()  # which layers have the window; empty: none

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos_token: bool = False

    @property
    def scale(self) -> float:
        """What q . k is multiplied with before the softmax."""
        return self.attention_scale or self.head_dim**-0.5

    def window(self, layer: int) -> int:
        """The attention window of a layer in positions, 0 where it sees the whole context."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else 0

    def layer_rope(self, layer: int) -> Rope | None:
        """The RoPE of a layer: the local one on sliding layers where the family has two."""
        return self.rope_local if self.rope_local and self.window(layer) else self.rope

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model under its canonical name, with its shape (rows are outputs)."""
        d, ff = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer_norm = self.norm == "layer"
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, d)}

        def norm(name: str) -> None:
            shapes[f"{name}.weight"] = (d,)
            if layer_norm:
                shapes[f"{name}.bias"] = (d,)

        def linear(name: str, rows: int, columns: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)

        if self.rope is None:
            shapes["positions.weight"] = (self.max_position_embeddings, d)
        for i in range(self.num_hidden_layers):
            at = f"layers.{i}."
            norm(at + "attn_norm")
            linear(at + "q", q, d, self.qkv_bias)
            linear(at + "k", kv, d, self.qkv_bias)
            linear(at + "v", kv, d, self.qkv_bias)
            linear(at + "o", d, q, self.o_bias)
            if self.qk_norm:
                shapes[at + "q_norm.weight"] = shapes[at + "k_norm.weight"] = (self.head_dim,)
            norm(at + "ffn_norm")
            linear(at + "gate", ff, d, self.ffn_bias)
            if self.gated:
                linear(at + "up", ff, d, self.ffn_bias)
            linear(at + "down", d, ff, self.ffn_bias)
            if self.hidden_act in THRESHOLDED:
                shapes[at + "act_threshold.weight"] = (ff,)
            if self.hidden_act in CENTRED:
                shapes[at + "act_centre.weight"] = (ff,)
                shapes[at + "bypass.weight"] = (d, d)
            if self.post_norms:
                norm(at + "attn_post_norm")
                norm(at + "ffn_post_norm")
        norm("final_norm")
        if not self.tie_word_embeddings:
            shapes["head.weight"] = (self.vocab_size, d)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises `TypeError` on unknown or missing fields, `ValueError` as `check`."""
        fields = dict(data)
        for key in ("rope", "rope_local"):
            if fields.get(key) is not None:
                rope = dict(fields[key])
                rope["factors"] = tuple(rope.get("factors", ()))
                fields[key] = Rope(**rope)
        for key in ("sliding_layers", "eos_token_ids"):
            fields[key] = tuple(fields.get(key, ()))
        config = cls(**fields)
        config.check()
        return config

    def check(self) -> None:
        """Raises `ValueError` for sizes that no model has: kernels rely on them."""
        sizes = (
            self.vocab_size, self.hidden_size, self.intermediate_size, self.num_hidden_layers,
            self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.max_position_embeddings,
        )  # fmt: skip
        if not all(isinstance(size, int) and 0 < size < 1 << 31 for size in sizes):
            raise ValueError("a size is not a positive whole number")
        if self.num_attention_heads % self.num_key_value_heads or (self.rope and self.head_dim % 2):
            raise ValueError("the heads do not divide")
        if self.sliding_layers and len(self.sliding_layers) != self.num_hidden_layers:
            raise ValueError("sliding_layers is not one per layer")
        if self.hidden_act not in ACTIVATIONS or self.norm not in ("rms", "layer") or self.sliding_window < 0:
            raise ValueError("an activation, norm or window is unknown")
        if self.hidden_act in CENTRED and (not self.gated or self.act_on_up or self.post_norms):
            raise ValueError(f"{self.hidden_act} is for gated FFNs whose output is added to the stream as it is")
