"""The methods by name: what each fits, what it costs to use, and how its parts become a `Selection`.

A *kind* is a part of a selection that is fitted layer by layer and has a density to choose in every layer; a *method*
is one kind or several, and methods combine with "+". A new kind needs an entry in `KINDS`. Knows nothing of how
densities are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fewfire import reference
from fewfire.config import EXACT_ZEROS
from fewfire.observe import Layer
from fewfire.packed import Packed
from fewfire.quantize import row_bytes
from fewfire.selectors import threshold
from fewfire.selectors.selection import Selection
from fewfire.selectors.threshold import Curve
from fewfire.spread import Choice

Fit = dict[str, np.ndarray]  # what was fitted for one layer; at least "densities" and "errors", both rising (falling)
GRID = np.round(np.arange(0.05, 1.001, 0.025), 3)  # densities to choose from


class Kind(NamedTuple):
    """How to fit one kind of part."""

    fit: Callable[[Packed, Layer], Fit]
    fill: Callable[
        [Packed, Sequence[Fit], Sequence[float]], Any
    ]  # fits and densities by layer -> the selection's field
    probe: str  # the kind whose measured damage stands for this one's: they change the same layer's same output


def _down(packed: Packed, layer: Layer) -> Fit:
    return _curve(packed, layer, layer.fired, threshold.down_weights(layer.tensors["down.weight"]))


def _gate(packed: Packed, layer: Layer) -> Fit:
    return _curve(packed, layer, layer.gate, threshold.gate_weights(layer.up, layer.tensors["down.weight"]))


def _curve(packed: Packed, layer: Layer, values: np.ndarray, weights: np.ndarray) -> Fit:
    config, down = packed.config, layer.tensors["down.weight"]
    output = reference.linear(layer.tensors, "down", layer.fired)
    normed = reference.normed(config, layer.tensors, "ffn_post_norm", output) if config.post_norms else None
    found = threshold.curve(values, weights, layer.fired, down, threshold.energy(layer.residual, output, normed))
    return dict(vars(found))


def _thresholds(packed: Packed, fits: Sequence[Fit], densities: Sequence[float]) -> np.ndarray:
    found = np.stack([Curve(**fit).thresholds(d) for fit, d in zip(fits, densities, strict=True)])
    # Zeros are left out at every density: that costs nothing.
    return np.maximum(found, np.float32(0)) if packed.config.hidden_act in EXACT_ZEROS else found


KINDS: dict[str, Kind] = {
    "down": Kind(_down, _thresholds, "down"),
    "gate": Kind(_gate, _thresholds, "down"),
}
_METHODS: dict[str, tuple[str, ...]] = {
    "down": ("down",),
    "gate": ("gate",),
}
#: What is tried if no method is asked for.
USUAL = ("down", "gate", "gate+down")


def kinds_of(method: str) -> tuple[str, ...]:
    """The kinds that a method such as "gate+down" consists of. Raises `ValueError` for one that is not known."""
    names = [name.strip() for name in method.split("+")]
    for name in names:
        if name not in _METHODS:
            raise ValueError(f"unknown method {name!r}: choose from {', '.join(_METHODS)}, or several joined with +")
    return tuple(dict.fromkeys(kind for name in names for kind in _METHODS[name]))


def selection(
    packed: Packed, method: str, fits: Mapping[str, Sequence[Fit]], densities: Mapping[str, Sequence[float]]
) -> Selection:
    """The selection that keeps, of each kind, the given share in each layer."""
    return Selection(method, **{k: KINDS[k].fill(packed, fits[k], d) for k, d in densities.items()})


def governed_bytes(packed: Packed, kinds: Sequence[str]) -> int:
    """Bytes of all rows that these kinds may leave out: what their density is a share of."""
    gate, up, down = _neuron(packed)
    per_neuron = down + (up if set(kinds) != {"down"} else 0)
    return packed.config.num_hidden_layers * packed.config.intermediate_size * per_neuron


def choices(packed: Packed, fits: Mapping[str, Sequence[Fit]], weights: Mapping[str, Sequence[float]]) -> list[Choice]:
    """One choice for each layer, whose settings are densities by kind.

    fits: by kind and layer; weights: damage done by an error of 1, by kind and layer. `Choice.bytes` counts the rows
    that these kinds may leave out.
    """
    layers = range(packed.config.num_hidden_layers)
    return [_ffn(packed, {k: fits[k][i] for k in fits}, {k: weights[k][i] for k in fits}) for i in layers]


def _ffn(packed: Packed, fits: Mapping[str, Fit], weights: Mapping[str, float]) -> Choice:
    grids = dict(zip(fits, np.meshgrid(*[GRID[::-1]] * len(fits), indexing="ij"), strict=True))
    damage = sum(weights[k] * np.interp(grids[k], fits[k]["densities"], fits[k]["errors"]) for k in fits)
    _, up, down = _neuron(packed)
    every = np.ones(())
    # What a later test keeps, nearly all earlier ones do: they look for the same neurons.
    fired = grids.get("gate", every)
    read = packed.config.intermediate_size * (
        (up * fired if "gate" in fits else 0) + down * np.minimum(fired, grids.get("down", every))
    )
    settings = [
        dict(zip(fits, map(float, each), strict=True))
        for each in np.stack(list(grids.values()), -1).reshape(-1, len(fits))
    ]
    return Choice(np.asarray(read, float).reshape(-1), np.asarray(damage).reshape(-1), settings)


def _neuron(packed: Packed) -> tuple[int, int, int]:
    """Bytes of a neuron's gate, up and down rows."""
    of, c = packed.formats, packed.config
    row = row_bytes(of.rows, c.hidden_size)
    return row, row if c.gated else 0, row_bytes(of.down, c.hidden_size)
