"""Watching a packed model read: what every layer computes for every token of a sample, in plain NumPy.

All tokens of the sample go through one layer, then through the next, so one layer's weights are in memory at a time
and models that would not fit in float32 can be watched too. The formulas are those of `reference.py`; the weights are
those of the packed format, multiplied in float32 without the engine's rounding of activations. Knows nothing of
selectors: calibration, fitting and `analyze` take from it what they need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fewfire import reference
from fewfire.packed import Packed
from fewfire.progress import Progress, silent
from fewfire.reference import Block, ReferenceCache
from fewfire.unpack import embedding_rows, final_norm, head_rows, layer_tensors

__all__ = ["Layer", "Observation", "head_rows"]


@dataclass(frozen=True, eq=False)
class Layer:
    """What one layer computed for all T tokens of a sample, in order; everything is float32."""

    number: int
    attn_in: np.ndarray  # (T, hidden) normed input of q, k and v
    joined: np.ndarray  # (T, heads * head_dim) input of o
    ffn_in: np.ndarray  # (T, hidden) normed input of gate and up
    gate: np.ndarray  # (T, neurons) act(gate x)
    up: np.ndarray | None  # (T, neurons) what gate is multiplied with, None where the model has no up matrix
    fired: np.ndarray  # (T, neurons) input of down: gate * up, or gate itself
    residual: np.ndarray  # (T, hidden) the residual stream that the FFN's output will be added to
    tensors: Mapping[str, np.ndarray]  # the layer's weights: "down.weight", (hidden, neurons), "ffn_norm.weight", ...


class Observation:
    """A sample on its way through a model: iterate over it for its layers, from the first to the last.

    Each window starts from an empty cache and attends to itself only. Raises `ValueError` for no windows, an empty one,
    one longer than the model's context, or a token that the model does not know.
    """

    def __init__(self, packed: Packed, windows: Sequence[Sequence[int]], progress: Progress = silent) -> None:
        config = packed.config
        if not windows or not all(len(window) for window in windows):
            raise ValueError("there are no tokens to observe")
        if max(len(window) for window in windows) > config.max_position_embeddings:
            raise ValueError(f"a window is longer than the model's {config.max_position_embeddings} positions")
        self.windows = [np.asarray(window, np.int64) for window in windows]
        if min(w.min() for w in self.windows) < 0 or max(w.max() for w in self.windows) >= config.vocab_size:
            raise ValueError(f"token ids must be from 0 to {config.vocab_size - 1}")
        self.packed = packed
        self._progress = progress
        self._final: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        """The T token ids in order, `(T,)` int64."""
        return np.concatenate(self.windows)

    @property
    def positions(self) -> np.ndarray:
        """Each token's place in its window, `(T,)` int64."""
        return np.concatenate([np.arange(len(window)) for window in self.windows])

    @property
    def final(self) -> np.ndarray:
        """The final hidden states, normed, `(T, hidden)`: the head's input. Only after all layers have been seen."""
        if self._final is None:
            raise ValueError("the final states are known only after the last layer: iterate over the observation first")
        return self._final

    def __iter__(self) -> Iterator[Layer]:
        config, count = self.packed.config, self.packed.config.num_hidden_layers
        streams = self._embedded()
        for number in range(count):
            self._progress("reading the sample", number, count)
            tensors = layer_tensors(self.packed, number)
            named = {f"layers.{number}.{name}": tensor for name, tensor in tensors.items()}
            blocks = [reference.block(config, named, number, x, np.arange(len(x)), ReferenceCache()) for x in streams]
            streams = [block.out for block in blocks]
            yield _joined(number, blocks, tensors)
        self._progress("reading the sample", count, count)
        norm = final_norm(self.packed)
        self._final = np.concatenate([reference.normed(config, norm, "final_norm", x) for x in streams])

    def _embedded(self) -> list[np.ndarray]:
        """What the first layer gets, `(T, hidden)` for each window."""
        used = np.unique(self.tokens)
        tensors = {"embed.weight": embedding_rows(self.packed, used)}
        if "positions" in self.packed.arrays:
            tensors["positions.weight"] = self.packed.arrays["positions"]
        return [
            reference.embedded(self.packed.config, tensors, np.searchsorted(used, ids), np.arange(len(ids)))
            for ids in self.windows
        ]


def _joined(number: int, blocks: list[Block], tensors: Mapping[str, np.ndarray]) -> Layer:
    """The windows one after another. Empties `blocks`, so that what is joined is not in memory twice."""
    parts = {name: [getattr(block, name) for block in blocks] for name in Block._fields if name != "out"}
    blocks.clear()
    gated = parts["up"][0] is not None
    return Layer(
        number=number,
        attn_in=np.concatenate(parts.pop("attn_in")),
        joined=np.concatenate(parts.pop("joined")),
        ffn_in=np.concatenate(parts.pop("ffn_in")),
        gate=np.concatenate(parts.pop("gate")),
        up=np.concatenate(parts.pop("up")) if gated else None,
        fired=np.concatenate(parts.pop("fired")),
        residual=np.concatenate(parts.pop("residual")),
        tensors=tensors,
    )
