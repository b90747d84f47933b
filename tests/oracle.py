"""What the engine must compute for a packed model: `reference.py` on its decoded weights, with the engine's rounding.

Integer formats multiply with activations as integers (int8 for q4 rows, int16 for q8) and keep float16 in the cache.
Where that happens is part of what the engine promises (norms' outputs and the joined heads), so the oracle can be
strict about it. Prefill keeps the neurons' outputs in float32, as the oracle does. Decode rounds them, times the scales
of their down rows, for eight neurons at a time (`kernels/axpy.py`): its logits are a little further off.
"""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import numpy as np

from fewfire import reference
from fewfire.packed import Packed
from fewfire.quantize import GROUP, padded
from perf.kernel_table import quantized
from unpack import tensors


class HalfCache(reference.ReferenceCache):
    """Keys and values in float16."""

    def extend(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        k, v = (a.astype(np.float16).astype(np.float32) for a in (k, v))
        return super().extend(layer, k, v)


def as_integers(x: np.ndarray, weights: str) -> np.ndarray:
    """Vectors as the kernels for rows of a format see them, `(T, columns)`."""
    wide = np.zeros((len(x), padded(x.shape[1])), np.float32)
    wide[:, : x.shape[1]] = x
    integers, scales = quantized(wide, weights)
    return (integers * np.repeat(scales, GROUP, axis=1))[:, : x.shape[1]]


def logits(packed: Packed, ids: Sequence[int], *, rounding: bool = True) -> np.ndarray:
    """Logits after each of `ids`, `(T, vocab)`; without rounding, what the decoded weights would give in float32."""
    weights = tensors(packed)
    if packed.weights in ("f32", "bf16") or not rounding:
        return reference.forward(packed.config, weights, ids)
    normed, normed_input, linear, of = reference.normed, reference.normed_input, reference.linear, packed.formats

    def rounded_normed(config: object, tensors: object, name: str, x: np.ndarray) -> np.ndarray:
        y = normed(config, tensors, name, x)  # type: ignore[arg-type]
        return as_integers(y, of.table) if "final" in name else y

    met: list[np.ndarray] = []  # the last input before it is rounded, which a bypass rounds in its own way

    def rounded_input(config: object, tensors: object, name: str, x: np.ndarray) -> np.ndarray:
        met[:] = [normed_input(config, tensors, name, x)]  # type: ignore[arg-type]
        return as_integers(met[0], of.rows)

    def rounded_linear(tensors: object, name: str, x: np.ndarray) -> np.ndarray:
        if name.endswith(".bypass"):
            x = as_integers(met[0], of.table)
        return linear(tensors, name, as_integers(x, of.rows) if name.endswith(".o") else x)  # type: ignore[arg-type]

    patches = {"normed": rounded_normed, "normed_input": rounded_input, "linear": rounded_linear}
    with patch.multiple(reference, **patches):
        return reference.forward(packed.config, weights, ids, HalfCache())
