"""Thresholds on what projections are multiplied with, and what they cost: the method `magnitude`.

TEAL (2408.14690) skips the columns of a projection whose input is small. All inputs of a layer have one threshold. With
weights from the norms of columns (WINA, 2505.19427) the outputs of o and of q, k and v lose some 5 % less, those of
gate and up nothing less, and the damage to the predictions is the same within what can be measured (SmolLM2-135M). q,
k and v share their inputs and so what is skipped, and so do gate and up. The inputs of down are the method `down` (see
`threshold.py`).

A fit is a `threshold.Curve`. The errors of o and of gate and up are those of the block's output beside the residual
stream. What an error of q, k and v does to the output, attention decides: theirs is relative to themselves, which is
the same up to a factor of each layer, as long as it is small.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from fewfire import reference
from fewfire.observe import Layer
from fewfire.pack import fit_q4
from fewfire.packed import Packed
from fewfire.quantize import decode, encode, row_bytes
from fewfire.selectors import threshold
from fewfire.selectors.fits import Fit, attention_energy, ffn_energy
from fewfire.selectors.selection import Columns, column_shape
from fewfire.selectors.threshold import DENSITIES, Curve

_TOKENS = 256  # that measure the errors of gate and up: a factor that is the same for all densities does not matter
_ROOM = 64  # bytes behind the last column that kernels may read


def fit_qkv(packed: Packed, layer: Layer) -> Fit:
    """For the inputs of q, k and v; the error is the mean of theirs, each relative to what it has of x."""
    parts = [layer.tensors[f"{name}.weight"] for name in "qkv"]
    every = -(-len(layer.attn_in) // _TOKENS)
    sizes = [float(np.square(layer.attn_in[::every] @ part.T).sum(axis=1).mean()) for part in parts]
    matrix = np.concatenate([part / np.sqrt(max(3 * size, 1e-30)) for part, size in zip(parts, sizes, strict=True)])
    return _curve(layer.attn_in, matrix.astype(np.float32), np.ones(len(layer.attn_in), np.float32))


def fit_o(packed: Packed, layer: Layer) -> Fit:
    """For the inputs of o, which are the joined heads."""
    return _curve(layer.joined, layer.tensors["o.weight"], attention_energy(packed, layer))


def fit_ffn(packed: Packed, layer: Layer) -> Fit:
    """For the inputs of gate and up."""
    config, number = packed.config, layer.number
    alike = np.ones(config.hidden_size, np.float32)
    every = -(-len(layer.ffn_in) // _TOKENS)
    x, fired, energy = layer.ffn_in[::every], layer.fired[::every], ffn_energy(packed, layer, every)
    named = {f"layers.{number}.{name}": tensor for name, tensor in layer.tensors.items()}
    cuts, errors = threshold.cuts(layer.ffn_in, DENSITIES, alike), []
    for cut in cuts:
        gate, up = reference.neurons(config, named, number, np.where(np.abs(x) > cut, x, np.float32(0)))
        lost = (fired - (gate if up is None else gate * up)) @ layer.tensors["down.weight"].T
        errors.append(float(np.mean(np.square(lost).sum(axis=1) / energy)) if cut >= 0 else 0.0)
    return dict(vars(Curve(np.array(DENSITIES), cuts, np.array(errors), alike)))


def _curve(x: np.ndarray, matrix: np.ndarray, energy: np.ndarray) -> Fit:
    return dict(vars(threshold.curve(x, np.ones(x.shape[1], np.float32), x, matrix, energy)))


def fill_qkv(packed: Packed, fits: Sequence[Fit], densities: Sequence[float]) -> Columns:
    """`Selection.qkv` that keeps these shares of each layer's inputs."""
    return _fill(packed, "qkv", fits, densities)


def fill_o(packed: Packed, fits: Sequence[Fit], densities: Sequence[float]) -> Columns:
    """`Selection.o` that keeps these shares of each layer's inputs."""
    return _fill(packed, "o", fits, densities)


def fill_ffn(packed: Packed, fits: Sequence[Fit], densities: Sequence[float]) -> Columns:
    """`Selection.ffn` that keeps these shares of each layer's inputs."""
    return _fill(packed, "ffn", fits, densities)


def _fill(packed: Packed, part: str, fits: Sequence[Fit], densities: Sequence[float]) -> Columns:
    limits = np.stack([Curve.of(fit).thresholds(density) for fit, density in zip(fits, densities, strict=True)])
    return Columns(_columns(packed, part, np.flatnonzero((limits >= 0).any(axis=1))), limits)


class _Stored:
    """One part's columns, encoded layer by layer as they are asked for."""

    def __init__(self, packed: Packed, part: str) -> None:
        inputs, outputs = column_shape(packed.config, part)
        shape = packed.config.num_hidden_layers, inputs, row_bytes(packed.formats.down, outputs)
        memory = np.zeros(int(np.prod(shape)) + _ROOM, np.uint8)
        self.array, self.done = memory[:-_ROOM].reshape(shape), set[int]()


# Columns are the same for all densities, and a calibration fills many selections, of which most leave something out in
# one layer. So they are encoded once for as long as a model is open, by its id.
_made: dict[int, dict[str, _Stored]] = {}


def _columns(packed: Packed, part: str, layers: np.ndarray) -> np.ndarray:
    """Stored columns `(layers, inputs, bytes)`: of these layers, and maybe of others; zeros of those never used."""
    if id(packed) not in _made:
        weakref.finalize(packed, _made.pop, id(packed), None)
    parts = _made.setdefault(id(packed), {})
    stored = parts.setdefault(part, _Stored(packed, part))
    for layer in set(layers.tolist()) - stored.done:
        matrix = np.ascontiguousarray(_matrix(packed, part, layer).T)
        stored.array[layer] = encode(matrix, packed.formats.down, "axpy", fit_q4).view(np.uint8)
        stored.done.add(layer)
    return stored.array


def _matrix(packed: Packed, part: str, layer: int) -> np.ndarray:
    """A projection's weights `(outputs, inputs)`, float32."""
    c, arrays, weights = packed.config, packed.arrays, packed.formats.rows
    stored = [arrays["gate" if part == "ffn" else part][layer]]
    if part == "ffn" and c.gated:
        stored.append(arrays["updown"][layer][:, : row_bytes(weights, c.hidden_size)])
    inputs = column_shape(c, part)[0]
    return np.concatenate([decode(rows, weights, "dot", inputs) for rows in stored])
