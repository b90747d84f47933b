"""Random weights of any shape of Llama, any rows of any tensor at once, of which a chosen share of neurons fires.

Promises: the same seed gives the same weights in whatever order they are read; values are those of bfloat16; a prompt
of random tokens goes through with activations of size 1 and logits that spread by 1 or 2. Speed is all that they are
good for.

How the share comes about: every embedding has, besides noise, the same component along one direction (random signs in
all channels, so that no channel stands out when weights are quantised), and the blocks add little to the residual
stream, so after each norm that component is still there and known. Each gate row has a multiple of this direction
added, which shifts the neuron's input by the quantile that the share asks for. As half of what a neuron sees is the
same for each token, some neurons fire often and others rarely, as in trained models.

What neurons see of a token is not random all over, or no predictor of low rank could tell who fires: a few functions of
the input explain much of it, as many as were measured in SmolLM2-135M.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from statistics import NormalDist

import numpy as np
import scipy.fft

from fewfire import reference
from fewfire.config import ModelConfig

_POOL = 2**24 + 1  # odd, so that a row that comes round again is shifted against itself
# What all FFNs, and all attention blocks, add to the variance of the residual stream, relative to the embedding's:
# enough that later layers see something else than the first one did.
_FFN, _ATTENTION = 3.0, 0.3
# The k-th function of the input explains (1 + k / 3)^-1.1 of what the first one does of all gates: a middle layer of
# SmolLM2-135M, where 64 of 576 explain 69 %, 128 81 %; in the first layers less, in the last ones more.
_FLAT, _POWER = 3, 1.1


class RandomWeights(Mapping[str, np.ndarray]):
    """Reads like a checkpoint, and maps names to whole tensors like the reference wants them."""

    def __init__(self, config: ModelConfig, share: float = 0.1, seed: int = 0) -> None:
        if not 0 < share < 1:
            raise ValueError(f"the share of neurons that fire must be over 0 and under 1, not {share}")
        self.config, self.share, self.seed = config, share, seed
        random = np.random.default_rng(seed)
        self._pool = random.standard_normal(_POOL, np.float32)
        signs = np.array([-1, 1], np.float32)
        self._direction = random.choice(signs, config.hidden_size) / np.float32(math.sqrt(config.hidden_size))
        # Random signs in the last norm: a tied head would else repeat each token, since its embedding is still there.
        self._final = random.choice(signs, config.hidden_size)
        explained = (1 + np.arange(config.hidden_size) / _FLAT) ** -_POWER
        self._spectrum = np.sqrt(explained / explained.mean()).astype(np.float32)
        self._signs = random.choice(signs, config.hidden_size)
        self._shapes = config.shapes()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop of a tensor, float32."""
        shape = self._shapes[name]
        stop = shape[0] if stop is None else stop
        if len(shape) == 1:
            return (self._final if name == "final_norm.weight" else np.ones(shape, np.float32))[start:stop]
        rows = self._noise(name, start, stop, shape[1])
        rows *= np.float32(self._size(name))
        if name.endswith("gate.weight"):  # a rotation that leaves no channel larger than others
            common = rows @ self._direction
            rows = scipy.fft.dct(rows * self._spectrum, norm="ortho", axis=1) * self._signs
            rows += np.outer(common - rows @ self._direction, self._direction)  # else the share would not be known
        if name in ("embed.weight", "head.weight"):
            hidden = self._final * self._direction  # what the common component is after the last norm
            rows -= np.outer(rows @ hidden, hidden)
        if name == "embed.weight":
            rows += self._direction * np.float32(self._size(name) * math.sqrt(shape[1]))
        if name.endswith("gate.weight"):
            rows += self._direction * np.float32(self._shift(int(name.split(".")[1])))
        return from_bf16(to_bf16(rows))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _noise(self, name: str, start: int, stop: int, columns: int) -> np.ndarray:
        """Standard normal numbers: a stretch of the pool that begins somewhere else for each tensor."""
        out = np.empty((stop - start) * columns, np.float32)
        at = (zlib.crc32(f"{self.seed} {name}".encode()) + start * columns) % _POOL
        done = 0
        while done < out.size:
            part = self._pool[at : at + out.size - done]
            out[done : done + part.size] = part
            done, at = done + part.size, 0
        return out.reshape(stop - start, columns)

    def _size(self, name: str) -> float:
        """Standard deviation of a tensor's noise."""
        c = self.config
        embedding = 2 / math.sqrt(c.hidden_size)
        if name.endswith("down.weight"):
            return embedding * math.sqrt(_FFN / c.num_hidden_layers / (c.intermediate_size * self._energy()))
        if name.endswith("o.weight"):
            inputs = c.num_attention_heads * c.head_dim
            return embedding * math.sqrt(_ATTENTION / c.num_hidden_layers / inputs)
        return embedding if name in ("embed.weight", "head.weight") else 1 / math.sqrt(c.hidden_size)

    def _quantile(self) -> float:
        return NormalDist().inv_cdf(self.share)

    def _energy(self) -> float:
        """The mean square of a neuron's activation after ReLU: of max(0, z + a normal number)."""
        z, normal = self._quantile(), NormalDist()
        return (z * z + 1) * normal.cdf(z) + z * normal.pdf(z)

    def _shift(self, layer: int) -> float:
        """How much of the common direction a layer's gate rows have."""
        attended = _ATTENTION * (layer + 1) / 2  # about half of it: averaging over the context takes the rest
        noise = 1 + (_FFN * layer + attended) / self.config.num_hidden_layers
        common = math.sqrt(self.config.hidden_size / (1 + noise))  # x . direction, after a norm
        return self._quantile() / common


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def from_bf16(values: np.ndarray) -> np.ndarray:
    """The float32 numbers that upper halves stand for."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def firing(weights: RandomWeights, tokens: int) -> tuple[list[float], np.ndarray]:
    """The share of neurons that fire in each layer over random tokens, and the logits, by the reference.

    Raises `ArithmeticError` if anything is not finite.
    """
    c = weights.config
    ids = np.random.default_rng(weights.seed).integers(0, c.vocab_size, tokens)
    x, cache, shares = weights["embed.weight"][ids], reference.ReferenceCache(), []
    for layer in range(c.num_hidden_layers):
        block = reference.block(c, weights, layer, x, np.arange(tokens), cache)
        shares.append(float((block.gate > 0).mean()))
        x = block.out
    x = reference.normed(c, weights, "final_norm", x)
    logits = x @ weights["embed.weight" if c.tie_word_embeddings else "head.weight"].T
    if not np.isfinite(logits).all():
        raise ArithmeticError("the random weights give logits that are not finite")
    return shares, logits
