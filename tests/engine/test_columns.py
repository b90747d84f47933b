"""Decoding by columns against the same forward pass in NumPy, and what the kernels say that they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from decoding import IDS, Margin, check_against, decided, decoded
from fewfire import reference
from fewfire.config import ModelConfig
from fewfire.model import Model
from fewfire.pack import pack
from fewfire.packed import Packed, open_packed
from fewfire.quantize import decode, encode, row_bytes
from fewfire.selectors import Columns, Selection
from fewfire.selectors.selection import COLUMNS, column_shape
from tiny import FAMILIES, write_tiny
from unpack import tensors

PackedPath = Callable[[str, str], Path]
NAMES = {"qkv": ("q", "k", "v"), "o": ("o",), "ffn": ("gate", "up")}
EVERYTHING = "qkv+o+ffn+gate+down"


def matrix(packed: Packed, part: str, layer: int) -> np.ndarray:
    """A projection's weights, `(outputs, inputs)`."""
    found = tensors(packed)
    names = [f"layers.{layer}.{name}.weight" for name in NAMES[part]]
    return np.concatenate([found[name] for name in names if name in found])


def stored(packed: Packed, part: str) -> np.ndarray:
    """Columns with room behind them."""
    layers, of = packed.config.num_hidden_layers, packed.formats
    found = np.stack([encode(matrix(packed, part, i).T, of.down, "axpy").view(np.uint8) for i in range(layers)])
    return np.concatenate([found.reshape(-1), np.zeros(64, np.uint8)])[:-64].reshape(found.shape)


def columns(random: np.random.Generator, packed: Packed, part: str) -> Columns:
    """Thresholds of all sizes around one, with inputs that are always kept and others that never are."""
    shape = packed.config.num_hidden_layers, column_shape(packed.config, part)[0]
    limits = random.gamma(2.0, 0.15, shape).astype(np.float32)
    limits[random.random(shape) < 0.05], limits[random.random(shape) < 0.05] = -1, np.inf
    return Columns(stored(packed, part), limits)


def certain(random: np.random.Generator, packed: Packed, method: str) -> Selection:
    """Inputs are always dropped or always kept, so that rounding them makes no difference to which are."""
    selection = selected(random, packed, method)
    for part in method.split("+"):
        limits = getattr(selection, part).thresholds
        limits[...] = np.where(limits > 0.3, np.inf, -1)
    return selection


def selected(random: np.random.Generator, packed: Packed, method: str) -> Selection:
    shape = packed.config.num_hidden_layers, packed.config.intermediate_size
    parts = {
        part: columns(random, packed, part) if part in COLUMNS else random.gamma(2.0, 0.05, shape).astype(np.float32)
        for part in method.split("+")
    }
    return Selection(method, **parts)  # type: ignore[arg-type]


def alike(packed: Packed, value: float, method: str = "qkv+o+ffn") -> Selection:
    """One threshold for all inputs."""
    layers = packed.config.num_hidden_layers
    return Selection(
        method,
        **{
            part: Columns(
                stored(packed, part),
                np.full((layers, column_shape(packed.config, part)[0]), value, np.float32),
            )
            for part in method.split("+")
        },  # type: ignore[arg-type]
    )


def twin(packed: Packed, selection: Selection, margin: Margin) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits `(T, vocab)` of `IDS`, and by part how many columns each layer reads for the last, `(layers,)`."""
    config, of, linear, neurons = packed.config, packed.formats, reference.linear, reference.neurons
    parts = {part: getattr(selection, part) for part in COLUMNS if getattr(selection, part) is not None}
    read = {part: np.zeros(config.num_hidden_layers, int) for part in parts}
    weights = tensors(packed)
    for part, value in parts.items():
        for layer in range(config.num_hidden_layers):
            whole = decode(value.columns[layer], of.down, "axpy", column_shape(config, part)[1]).T
            names = [f"layers.{layer}.{name}.weight" for name in NAMES[part]]
            sizes = [len(weights[name]) for name in names if name in weights]
            weights |= dict(zip(names, np.split(whole, np.cumsum(sizes)[:-1]), strict=False))

    def some(tensors: reference.Tensors, name: str, x: np.ndarray) -> np.ndarray:
        _, layer, last = name.split(".")
        for part, value in parts.items():
            if last in NAMES[part]:
                kept = margin.over(np.abs(x), value.thresholds[int(layer)])
                read[part][int(layer)], x = kept[-1].sum(), np.where(kept, x, 0)
        return linear(tensors, name, x)

    def kept(
        config: ModelConfig, weights: reference.Tensors, layer: int, x: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        gate, up = neurons(config, weights, layer, x)
        passed = np.ones(gate.shape, bool)
        if selection.gate is not None:
            passed = margin.over(np.abs(gate), selection.gate[layer])
        fired = np.where(passed, gate if up is None else gate * up, 0)
        stays = passed if selection.down is None else margin.over(np.abs(fired), selection.down[layer])
        return np.where(stays, fired, 0), np.ones_like(gate) if config.gated else None

    with patch.object(reference, "linear", some), patch.object(reference, "neurons", kept):
        return reference.forward(config, weights, IDS), read


@pytest.mark.parametrize("method", [*COLUMNS, EVERYTHING])
@pytest.mark.parametrize("family", FAMILIES)
def test_columns_against_the_twin(
    family: str, method: str, packed_path: PackedPath, random: np.random.Generator
) -> None:
    packed = open_packed(packed_path(family, "f32"))
    selection, (theirs, _) = decided(lambda: selected(random, packed, method), partial(twin, packed))
    check_against(packed, selection, theirs, 3)


@pytest.mark.parametrize("weights", ["q8", "q4"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "gemma3", "opt"])
def test_integers_against_the_twin(
    family: str, weights: str, packed_path: PackedPath, random: np.random.Generator
) -> None:
    packed = open_packed(packed_path(family, weights))
    selection = certain(random, packed, "qkv+o+ffn")
    model = Model(packed, 2, dense=True)
    model.engine.select(selection, dense=True)
    ours, (theirs, _) = decoded(model), twin(packed, selection, Margin())
    off = np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean())
    assert off < (0.002 if weights == "q8" else 0.05)


@pytest.mark.parametrize("weights", ["f32", "q8"])
def test_sizes_that_are_no_multiple_of_anything(tmp_path: Path, weights: str, random: np.random.Generator) -> None:
    sizes = {"hidden_size": 40, "intermediate_size": 50, "num_attention_heads": 5, "num_key_value_heads": 1}
    path = write_tiny("llama-bias", tmp_path / "odd", head_dim=6, vocab_size=311, **sizes)
    packed = open_packed(pack(path, tmp_path / "packed", weights))
    make, method = (selected, EVERYTHING) if weights == "f32" else (certain, "qkv+o+ffn")
    selection, (theirs, _) = decided(lambda: make(random, packed, method), partial(twin, packed))
    model = Model(packed, 2)
    model.engine.select(selection)
    assert np.abs(decoded(model) - theirs).max() < (2e-4 if weights == "f32" else 0.02)


@pytest.mark.parametrize("weights", ["f32", "q4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_density_one_is_dense(family: str, weights: str, packed_path: PackedPath) -> None:
    packed = open_packed(packed_path(family, weights))
    model = Model(packed, 2)
    dense, read = decoded(model), model.engine.bytes_read()
    model.engine.select(alike(packed, -1.0))
    np.testing.assert_array_equal(decoded(model), dense)
    assert model.engine.bytes_read() == read


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_all_columns_are_all_rows(family: str, packed_path: PackedPath) -> None:
    """Nothing is dropped at a threshold that nothing is under, but columns are read."""
    packed = open_packed(packed_path(family, "f32"))
    model = Model(packed, 2, dense=True)
    dense = decoded(model)
    selection = alike(packed, -1.0)
    for part in COLUMNS:
        getattr(selection, part).thresholds[:, 0] = 0.0
    model.engine.select(selection, dense=True)
    ours = decoded(model)
    assert np.abs(ours - dense).max() < 2e-4
    assert (ours != dense).any()


@pytest.mark.parametrize("weights", ["f32", "q4", "q8"])
@pytest.mark.parametrize("family", ["llama-bias", "gemma3", "opt"])
def test_a_layer_may_drop_everything(family: str, weights: str, packed_path: PackedPath) -> None:
    packed = open_packed(packed_path(family, weights))
    model, of, c = Model(packed, 2, dense=True), packed.formats, packed.config
    for part in (*COLUMNS, "+".join(COLUMNS)):
        model.engine.select(alike(packed, np.inf, part), dense=True)
        assert np.isfinite(decoded(model)).all()
    down = c.num_hidden_layers * c.intermediate_size * row_bytes(of.down, c.hidden_size)
    tables = packed.arrays.get("head", packed.arrays["embed"]).nbytes + packed.arrays["embed"].shape[2]
    limits = sum(4 * c.num_hidden_layers * column_shape(c, part)[0] for part in COLUMNS)
    assert model.engine.bytes_read() == down + tables + limits


@pytest.mark.parametrize("weights", ["f32", "q4", "q8"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_bytes_are_those_of_the_columns(
    family: str, weights: str, packed_path: PackedPath, random: np.random.Generator
) -> None:
    """Of layers by columns, and of one by rows."""
    packed = open_packed(packed_path(family, weights))
    c, of, arrays = packed.config, packed.formats, packed.arrays
    model = Model(packed, 2, dense=True)
    every = model.engine.bytes_read()
    decoded(model, IDS[:1])
    assert model.engine.bytes_read() == every

    def draw() -> Selection:
        selection = (selected if weights == "f32" else certain)(random, packed, "qkv+o+ffn")
        for part in COLUMNS:
            getattr(selection, part).thresholds[1] = -1
        return selection

    selection, (_, read) = decided(draw, partial(twin, packed))
    model.engine.select(selection, dense=True)
    assert model.engine.bytes_read() == every  # what the last token read
    decoded(model)
    up = row_bytes(of.rows, c.hidden_size) * c.intermediate_size if c.gated else 0
    rows = {"qkv": arrays["qkv"][0].nbytes, "o": arrays["o"][0].nbytes, "ffn": arrays["gate"][0].nbytes + up}
    expected = every
    for part in COLUMNS:
        columns = int(read[part][0] + read[part][2])
        assert 0 < columns < 2 * column_shape(c, part)[0]
        expected += columns * row_bytes(of.down, column_shape(c, part)[1]) - 2 * rows[part]
        expected += 2 * 4 * column_shape(c, part)[0]  # thresholds
    assert model.engine.bytes_read() == expected
    model.engine.select(None, dense=True)
    decoded(model, IDS[:1])
    assert model.engine.bytes_read() == every


@pytest.mark.parametrize("part", COLUMNS)
def test_nan_is_not_hidden(part: str, packed_path: PackedPath) -> None:
    """What meets a projection may be NaN without being over any threshold."""
    packed = open_packed(packed_path("llama", "f32"))
    selection = alike(packed, np.inf, part)
    weights = np.array(packed.arrays["attn_norm" if part == "qkv" else "ffn_norm"])
    if part == "o":  # values that are NaN make the heads so
        weights = np.array(packed.arrays["qkv"])
        weights.view(np.float32)[0, -1, :] = np.nan
    else:
        weights[0, 3] = np.nan
    name = {"qkv": "attn_norm", "o": "qkv", "ffn": "ffn_norm"}[part]
    packed = dataclasses.replace(packed, arrays={**packed.arrays, name: weights})
    model = Model(packed, 2)
    model.engine.select(selection)
    assert np.isnan(decoded(model, IDS[:2])).any()


def test_wrong_columns_are_refused(packed_path: PackedPath) -> None:
    packed = open_packed(packed_path("llama", "q4"))
    model, right = Model(packed, 1), alike(packed, 0.5, "o").o
    assert right is not None
    for what, wrong in (
        ("columns", dataclasses.replace(right, columns=right.columns[:, :-1])),
        ("columns", dataclasses.replace(right, columns=right.columns.view(np.int8))),
        ("thresholds", dataclasses.replace(right, thresholds=right.thresholds[:, 0])),
        ("thresholds", dataclasses.replace(right, thresholds=right.thresholds.astype(float))),
    ):
        with pytest.raises(ValueError, match=f"o.{what} is"):
            model.engine.select(Selection("o", o=wrong))
