"""Decoding with thresholds against the same forward pass in NumPy, and what the kernels say that they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from fewfire import reference
from fewfire.config import EXACT_ZEROS, ModelConfig
from fewfire.model import Model
from fewfire.packed import Packed, open_packed
from fewfire.quantize import row_bytes
from fewfire.selectors import Predictor, Selection
from tiny import FAMILIES, prompt
from unpack import tensors

PackedPath = Callable[[str, str], Path]
IDS = prompt(20)


def decoded(model: Model, ids: Sequence[int] = IDS) -> np.ndarray:
    session = model.session()
    return np.stack([session.feed([token]) for token in ids])


def thresholds(random: np.random.Generator, packed: Packed, size: float) -> np.ndarray:
    """Of all sizes around one, with neurons that are always kept and others that never are."""
    shape = packed.config.num_hidden_layers, packed.config.intermediate_size
    found = random.gamma(2.0, size / 2, shape).astype(np.float32)
    found[random.random(shape) < 0.05], found[random.random(shape) < 0.05] = -1, np.inf
    return found


def twin(packed: Packed, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
    """The logits `(T, vocab)` of `IDS`, and how many up and down rows each layer needs for the last, `(layers, 2)`."""
    neurons, read = reference.neurons, np.zeros((packed.config.num_hidden_layers, 2), int)

    def kept(
        config: ModelConfig, weights: reference.Tensors, layer: int, x: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        gate, up = neurons(config, weights, layer, x)
        passed = np.ones(gate.shape, bool) if selection.gate is None else np.abs(gate) > selection.gate[layer]
        fired = np.where(passed, gate if up is None else gate * up, 0)
        stays = passed if selection.down is None else passed & (np.abs(fired) > selection.down[layer])
        read[layer] = passed[-1].sum(), stays[-1].sum()
        return np.where(stays, fired, 0), np.ones_like(gate) if config.gated else None

    with patch.object(reference, "neurons", kept):
        return reference.forward(packed.config, tensors(packed), IDS), read


@pytest.mark.parametrize("parts", ["gate", "down", "gate+down"])
@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_against_the_twin(
    family: str, parts: str, packed_path: PackedPath, random: np.random.Generator
) -> None:
    packed = open_packed(packed_path(family, "f32"))
    model = Model(packed, 2, dense=True)
    dense = decoded(model)
    selection = Selection(parts, **{part: thresholds(random, packed, 0.1) for part in parts.split("+")})
    model.engine.select(selection, dense=True)
    ours, (theirs, read) = decoded(model), twin(packed, selection)
    assert np.abs(ours - theirs).max() < 2e-4
    assert np.abs(ours - dense).max() > 0.01
    np.testing.assert_array_equal(model.engine.neurons_read(), read)
    one = Model(packed, 1, dense=True)
    one.engine.select(selection, dense=True)
    np.testing.assert_array_equal(decoded(one), ours)


@pytest.mark.parametrize("weights", ["q4", "q8"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_bytes_are_those_of_the_rows(
    family: str, weights: str, packed_path: PackedPath, random: np.random.Generator
) -> None:
    packed = open_packed(packed_path(family, weights))
    model, of, hidden = Model(packed, 2), packed.formats, packed.config.hidden_size
    decoded(model)
    model.engine.select(None, dense=True)
    decoded(model, IDS[:1])
    every = model.engine.bytes_read()
    model.engine.select(Selection("gate+down", *(thresholds(random, packed, 0.1) for _ in range(2))))
    decoded(model)
    missing = packed.config.num_hidden_layers * packed.config.intermediate_size - model.engine.neurons_read().sum(
        axis=0
    )
    assert (missing > 0).all()
    up = row_bytes(of.rows, hidden) if packed.config.gated else 0
    assert every - model.engine.bytes_read() == missing[0] * up + missing[1] * row_bytes(of.down, hidden)


@pytest.mark.parametrize("weights", ["f32", "q4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_density_one_is_dense(family: str, weights: str, packed_path: PackedPath) -> None:
    packed = open_packed(packed_path(family, weights))
    model, shape = Model(packed, 2, dense=True), (packed.config.num_hidden_layers, packed.config.intermediate_size)
    dense = decoded(model)
    model.engine.select(Selection("gate+down", *(np.full(shape, -1, np.float32) for _ in range(2))), dense=True)
    np.testing.assert_array_equal(decoded(model), dense)
    assert (model.engine.neurons_read() == shape[1]).all()


def test_a_layer_may_drop_everything(packed_path: PackedPath) -> None:
    packed = open_packed(packed_path("llama", "q4"))
    model, shape = Model(packed, 2), (packed.config.num_hidden_layers, packed.config.intermediate_size)
    for part in ("gate", "down"):
        model.engine.select(Selection(part, **{part: np.full(shape, np.inf, np.float32)}))
        assert np.isfinite(decoded(model)).all()
        assert (model.engine.neurons_read()[:, 1] == 0).all()


def test_a_selection_is_taken_back(packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path("llama-relu", "q4"))
    assert packed.config.hidden_act in EXACT_ZEROS
    model = Model(packed, 2)
    before = decoded(model)
    model.engine.select(Selection("gate", gate=thresholds(random, packed, 0.5)))
    assert (decoded(model) != before).any()
    model.engine.select(None)
    np.testing.assert_array_equal(decoded(model), before)


def test_what_cannot_be_used_is_refused(packed_path: PackedPath) -> None:
    packed = open_packed(packed_path("llama", "q4"))
    model, size = Model(packed, 1), (packed.config.num_hidden_layers, packed.config.intermediate_size)
    for wrong in (np.zeros(size[1], np.float32), np.zeros(size)):
        with pytest.raises(ValueError, match="gate: thresholds must be float32"):
            model.engine.select(Selection("gate", gate=wrong))
    predictor = Predictor(np.zeros(1), np.zeros(1), np.zeros(1))
    for selection in (Selection("lowrank", predictor=predictor), Selection("reuse", window=4)):
        with pytest.raises(ValueError, match="decoding cannot use"):
            model.engine.select(selection)
