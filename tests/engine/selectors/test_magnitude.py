"""Thresholds on inputs keep the share that they promise, and cost what the exact output says."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fewfire import reference
from fewfire.model import Model
from fewfire.observe import Layer, Observation
from fewfire.packed import Packed, open_packed
from fewfire.quantize import FORMATS, decode
from fewfire.selectors import Selection, magnitude
from fewfire.selectors.parts import flatten, misfit
from fewfire.selectors.selection import COLUMNS, column_shape
from fewfire.selectors.threshold import Curve
from tiny import FAMILIES, prompt

PackedPath = Callable[[str, str], Path]
FIT = {part: getattr(magnitude, f"fit_{part}") for part in COLUMNS}
FILL = {part: getattr(magnitude, f"fill_{part}") for part in COLUMNS}


def inputs(layer: Layer, part: str) -> np.ndarray:
    return {"qkv": layer.attn_in, "o": layer.joined, "ffn": layer.ffn_in}[part]


def observed(packed: Packed) -> list[Layer]:
    return list(Observation(packed, [prompt(100, seed=seed) for seed in range(2)]))


@pytest.mark.parametrize("part", COLUMNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_densities_come_out(family: str, part: str, packed_path: PackedPath) -> None:
    packed = open_packed(packed_path(family, "f32"))
    layers = observed(packed)
    fits = [FIT[part](packed, layer) for layer in layers]
    for fit in fits:
        assert (np.diff(fit["densities"]) > 0).all()
        left = fit["errors"]  # nothing is lost where half of the inputs are zero already
        assert ((np.diff(left) < 0) | (left[1:] < 1e-9)).all()
        assert (fit["densities"][-1], fit["errors"][-1]) == (1.0, 0.0)
    wanted = [0.2, 0.5, 0.85]
    filled = FILL[part](packed, fits, wanted)
    assert misfit(packed, *flatten(Selection("magnitude", **{part: filled}))) == ""
    for layer, density in zip(layers, wanted, strict=True):
        x = inputs(layer, part)
        kept, some = np.abs(x) > filled.thresholds[layer.number], float((x != 0).mean())
        assert kept.mean() == pytest.approx(min(density, some), abs=0.02)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_errors_are_those_of_the_output(family: str, packed_path: PackedPath) -> None:
    packed = open_packed(packed_path(family, "f32"))
    config, layer = packed.config, observed(packed)[1]
    named = {f"layers.1.{name}": tensor for name, tensor in layer.tensors.items()}

    def dropped(part: str) -> tuple[float, np.ndarray]:
        fit = FIT[part](packed, layer)
        x = inputs(layer, part)
        return fit["errors"][7], np.where(np.abs(x) > Curve(**fit).thresholds(fit["densities"][7]), x, 0)

    def ratio(lost: np.ndarray, size: np.ndarray) -> float:
        return float(np.mean(np.square(lost).sum(axis=1) / np.square(size).sum(axis=1)))

    def output(name: str, x: np.ndarray) -> np.ndarray:
        return reference.linear(layer.tensors, name, x)

    def after(name: str, y: np.ndarray, size: np.ndarray) -> np.ndarray:
        """An error as the norm after the block scales it, where there is one."""
        if not config.post_norms:
            return y
        normed = reference.normed(config, layer.tensors, f"{name}_post_norm", size)
        return y * np.sqrt(np.square(normed).sum(axis=1) / np.square(size).sum(axis=1))[:, None]

    error, x = dropped("o")
    whole = output("o", layer.joined)
    lost = after("attn", output("o", x) - whole, whole)
    assert error == pytest.approx(ratio(lost, layer.residual), rel=1e-3)

    error, x = dropped("ffn")
    gate, up = reference.neurons(config, named, 1, x)
    whole = output("down", layer.fired)
    lost = after("ffn", output("down", gate if up is None else gate * up) - whole, whole)
    added = reference.normed(config, layer.tensors, "ffn_post_norm", whole) if config.post_norms else whole
    assert error == pytest.approx(ratio(lost, layer.residual + added), rel=1e-3)

    error, x = dropped("qkv")
    parts = [layer.tensors[f"{name}.weight"] for name in "qkv"]
    each = [np.square((layer.attn_in - x) @ part.T).sum() / np.square(layer.attn_in @ part.T).sum() for part in parts]
    assert error == pytest.approx(np.mean(each), rel=1e-3)


@pytest.mark.parametrize("part", COLUMNS)
@pytest.mark.parametrize("weights", FORMATS)
def test_columns_are_the_weights(part: str, weights: str, packed_path: PackedPath) -> None:
    packed = open_packed(packed_path("llama", weights))
    layers = observed(packed)
    fits = [FIT[part](packed, layer) for layer in layers]
    one = FILL[part](packed, fits, [1.0, 0.5, 1.0])
    assert (one.thresholds[[0, 2]] == -1).all()
    assert (one.thresholds[1] >= 0).all()
    names = {"qkv": "qkv", "o": "o", "ffn": ("gate", "up")}[part]
    whole = np.concatenate([layers[1].tensors[f"{name}.weight"] for name in names])
    stored = decode(one.columns[1], packed.formats.down, "axpy", column_shape(packed.config, part)[1]).T
    tolerance = {"f32": 0, "bf16": 0, "q8": 0.01, "q4": 0.01}[weights]  # q4: down is q8 in small models
    assert np.abs(stored - whole).max() <= tolerance * np.abs(whole).max()
    assert FILL[part](packed, fits, [1.0, 0.7, 0.5]).columns is one.columns  # encoded once
    assert one.columns.any(axis=(1, 2)).tolist() == [False, True, True]


@pytest.mark.parametrize("weights", ["f32", "q4"])
def test_density_one_is_dense(weights: str, packed_path: PackedPath) -> None:
    packed = open_packed(packed_path("llama", weights))
    layers, model = observed(packed), Model(packed, 2)
    dense = model.session().feed([7])
    for part in COLUMNS:
        fits = [FIT[part](packed, layer) for layer in layers]
        model.engine.select(Selection("magnitude", **{part: FILL[part](packed, fits, [1.0] * 3)}))
        np.testing.assert_array_equal(model.session().feed([7]), dense)
        model.engine.select(Selection("magnitude", **{part: FILL[part](packed, fits, [0.5] * 3)}))
        assert (model.session().feed([7]) != dense).any()


def test_nothing_is_kept_of_closed_models(packed_path: PackedPath) -> None:
    packed = open_packed(packed_path("llama", "f32"))
    fits = [magnitude.fit_o(packed, layer) for layer in observed(packed)]
    kept = weakref.ref(magnitude.fill_o(packed, fits, [0.5] * 3).columns.base)
    assert kept() is not None
    del packed, fits
    gc.collect()
    assert kept() is None
