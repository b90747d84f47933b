"""Decoding with selections against the same forward pass in NumPy, and what the kernels say that they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from decoding import IDS, Margin, check_against, decided, decoded
from fewfire import reference
from fewfire.config import EXACT_ZEROS, ModelConfig
from fewfire.model import Model
from fewfire.packed import Packed, open_packed
from fewfire.quantize import encode, row_bytes
from fewfire.selectors import Predictor, Selection
from fewfire.selectors.fitting import spread
from fewfire.selectors.predicted import scores
from tiny import FAMILIES
from unpack import tensors as unpacked

PackedPath = Callable[[str, str], Path]


def thresholds(random: np.random.Generator, packed: Packed, size: float) -> np.ndarray:
    """Of all sizes around one, with neurons that are always kept and others that never are."""
    shape = packed.config.num_hidden_layers, packed.config.intermediate_size
    found = random.gamma(2.0, size / 2, shape).astype(np.float32)
    found[random.random(shape) < 0.05], found[random.random(shape) < 0.05] = -1, np.inf
    return found


def predictor(random: np.random.Generator, packed: Packed, groups: int, rank: int) -> Predictor:
    """Of random rows, that keeps some 60 %, with groups that are always kept and others that never are."""
    c, of = packed.config, packed.formats
    layers, columns = c.num_hidden_layers, rank or c.hidden_size

    def rows(count: int, columns: int) -> np.ndarray:
        values = random.standard_normal((layers * count, columns)).astype(np.float32)
        return encode(values, of.rows, "dot").view(np.uint8).reshape(layers, count, -1)

    bias = random.standard_normal((layers, groups), np.float32) + 1
    bias[random.random(bias.shape) < 0.05], bias[random.random(bias.shape) < 0.05] = np.inf, -np.inf
    members = np.stack([random.permutation(c.intermediate_size) for _ in range(layers)]).astype(np.int32)
    basis = rows(rank, c.hidden_size) if rank else None
    return Predictor(rows(groups, columns), bias, members, basis)


def selected(random: np.random.Generator, packed: Packed, parts: str) -> Selection:
    """A selection of these parts with random contents."""
    c, found = packed.config, dict[str, Any]()
    for part in parts.split("+"):
        match part:
            case "gate" | "down":
                found[part] = thresholds(random, packed, 0.1)
            case "top":
                found[part] = random.integers(0, c.intermediate_size // 8, c.num_hidden_layers).astype(np.int32)
                found[part][0] = c.intermediate_size
            case "lowrank":
                found["predictor"] = predictor(random, packed, c.intermediate_size, 20)
            case "router":
                found["predictor"] = predictor(random, packed, -(-c.intermediate_size // 7), 0)
            case "reuse":
                found["window"] = 5
    return Selection(parts, **found)


def twin(packed: Packed, selection: Selection, margin: Margin) -> tuple[np.ndarray, np.ndarray]:
    """The logits `(T, vocab)` of `IDS`, and how many gate, up and down rows each layer needs for the last."""
    neurons, read = reference.neurons, np.zeros((packed.config.num_hidden_layers, 3), int)

    def kept(
        config: ModelConfig, tensors: reference.Tensors, layer: int, x: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        gate, up = neurons(config, tensors, layer, x)
        fired = gate if up is None else gate * up
        every = np.ones(gate.shape, bool)
        guessed, passed, stays = every, every, every
        if selection.predictor:
            seen: Any = SimpleNamespace(number=layer, ffn_in=x)
            found = scores(selection.predictor, packed.formats, seen)
            guessed = spread(margin.over(found, 0.0), selection.predictor.members[layer])
        if selection.top is not None and (k := selection.top[layer]) < gate.shape[1]:
            passed = margin.largest(np.abs(gate), k)
        if selection.gate is not None:
            passed = passed & margin.over(np.abs(gate), selection.gate[layer])
        if selection.down is not None:
            stays = margin.over(np.abs(fired), selection.down[layer])
        before, out = np.zeros(gate.shape[1], bool), np.zeros_like(fired)
        for t in range(len(x)):
            before &= t % selection.window != 0
            met = guessed[t] | before
            left = met & (passed[t] | before)
            last = left & (stays[t] | before)
            out[t], read[layer] = np.where(last, fired[t], 0), (met.sum(), left.sum(), last.sum())
            before = before | last if selection.window > 1 else before
        return out, np.ones_like(gate) if config.gated else None

    with patch.object(reference, "neurons", kept):
        return reference.forward(packed.config, unpacked(packed), IDS), read


PARTS = ["gate", "down", "gate+down", "top", "top+gate+down", "lowrank", "lowrank+gate", "router", "router+gate+down"]
PARTS += ["gate+reuse", "down+reuse", "top+down+reuse", "router+gate+reuse"]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_selections_against_the_twin(
    family: str, parts: str, packed_path: PackedPath, random: np.random.Generator
) -> None:
    packed = open_packed(packed_path(family, "f32"))
    selection, (theirs, read) = decided(lambda: selected(random, packed, parts), partial(twin, packed))
    np.testing.assert_array_equal(check_against(packed, selection, theirs, 2).engine.neurons_read(), read)


def test_what_is_kept_does_not_depend_on_what_was_taken_back(
    packed_path: PackedPath, random: np.random.Generator
) -> None:
    model = Model(open_packed(packed_path("llama", "q4")), 2)
    model.engine.select(selected(random, model.packed, "gate+reuse"))
    session, other = model.session(), model.session()
    session.feed(IDS[:6])
    other.feed(IDS[:6])
    first = session.feed(IDS[6:7])
    for token in IDS[10:12]:
        session.feed([token])
    session.rewind(6)
    np.testing.assert_array_equal(session.feed(IDS[6:7]), first)
    np.testing.assert_array_equal(other.feed(IDS[6:7]), first)
    np.testing.assert_array_equal(session.feed(IDS[7:8]), other.feed(IDS[7:8]))


def test_what_is_kept_is_forgotten_without_a_window(packed_path: PackedPath, random: np.random.Generator) -> None:
    """Reuse, then nothing, then reuse again, whose second beginning Ctrl-C takes for a moment."""
    model, alone = (Model(open_packed(packed_path("llama", "q4")), 1) for _ in range(2))
    reuse = dataclasses.replace(selected(random, model.packed, "gate"), window=64)
    session, other = model.session(), alone.session()
    for number, token in enumerate(IDS[:12]):
        if number in (0, 8):
            model.engine.select(reuse)
            alone.engine.select(reuse)
        elif number == 4:
            model.engine.select(None)
            alone.engine.select(None)
        if number == 8:
            other = alone.session()
            other.feed(IDS[:8], prompt=True)
            for mine, its in ((other._cache.keys, session._cache.keys), (other._cache.values, session._cache.values)):
                mine[...] = its
            with (
                patch.object(type(session._cache), "number", side_effect=KeyboardInterrupt),
                pytest.raises(KeyboardInterrupt),
            ):
                session.feed([token])
        np.testing.assert_array_equal(session.feed([token]), other.feed([token]))
        if 4 <= number < 8:
            assert session._cache.record["kept"][0] == 0


def test_growing_a_cache_keeps_what_is_kept(packed_path: PackedPath, random: np.random.Generator) -> None:
    model = Model(open_packed(packed_path("llama", "q4")), 2)
    model.engine.select(dataclasses.replace(selected(random, model.packed, "gate"), window=64))
    caches = [model.engine.new_cache(n) for n in (4, 16)]
    logits = np.empty((2, model.config.vocab_size), np.float32)
    for position in range(8):
        if position == 4:
            caches[0] = caches[0].grown(16, 4)
        for cache, out in zip(caches, logits, strict=True):
            model.engine.decode(IDS[position], position, cache, out)
        np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("weights", ["q4", "q8"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "llama-centred"])
def test_bytes_are_those_of_the_rows(
    family: str, weights: str, packed_path: PackedPath, random: np.random.Generator
) -> None:
    packed = open_packed(packed_path(family, weights))
    model, of, hidden = Model(packed, 2), packed.formats, packed.config.hidden_size
    decoded(model)
    model.engine.select(None, dense=True)
    decoded(model, IDS[:1])
    every = model.engine.bytes_read()
    assert every == packed.bytes_per_token()
    selection = selected(random, packed, "lowrank+gate+down")
    model.engine.select(selection)
    decoded(model)
    assert selection.predictor
    assert selection.predictor.basis is not None
    missing = (packed.config.intermediate_size - model.engine.neurons_read()).sum(axis=0)
    assert (missing > 0).all()
    row = row_bytes(of.rows, hidden)
    saved = missing[0] * row + missing[1] * packed.config.gated * row + missing[2] * row_bytes(of.down, hidden)
    added = selection.predictor.rows, selection.predictor.basis, selection.predictor.bias, selection.predictor.members
    predicting = sum(array.nbytes for array in (*added, selection.gate, selection.down) if array is not None)
    assert every - model.engine.bytes_read() == saved - predicting


def test_layers_where_nothing_is_left_out_add_no_bytes(packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path("llama", "q4"))
    model, selection = Model(packed, 2), selected(random, packed, "lowrank+gate")
    assert selection.predictor
    assert selection.predictor.basis is not None
    assert selection.gate is not None
    selection.gate[1:], selection.predictor.bias[1:] = -1, np.inf
    selection.gate[0], selection.predictor.bias[0] = np.inf, np.float32(1e9)  # drops all, of what the predictor keeps
    model.engine.select(selection)
    session = model.session()
    session.feed(IDS[:1])
    c, of = packed.config, packed.formats
    row = row_bytes(of.rows, c.hidden_size)
    saved = c.intermediate_size * (row + row_bytes(of.down, c.hidden_size))
    added = selection.predictor.rows, selection.predictor.basis, selection.predictor.bias, selection.predictor.members
    predicting = sum(array[0].nbytes for array in (*added, selection.gate))
    assert session.bytes_read == packed.bytes_per_token() - saved + predicting


def test_each_session_knows_what_its_own_token_read(packed_path: PackedPath, random: np.random.Generator) -> None:
    model = Model(open_packed(packed_path("llama", "q4")), 2)
    model.engine.select(selected(random, model.packed, "gate"))
    alone, sessions = list[int](), [model.session() for _ in IDS]
    assert sessions[0].bytes_read == model.packed.bytes_per_token()
    for session, token in zip(sessions, IDS, strict=True):
        session.feed([token])
        alone.append(model.engine.bytes_read())
    assert len(set(alone)) > 1
    assert [session.bytes_read for session in sessions] == alone
    model.engine.select(None)
    assert [session.bytes_read for session in sessions] == alone
    sessions[0].feed(IDS[:2])  # at once, which decodes nothing
    assert sessions[0].bytes_read == alone[0]


@pytest.mark.parametrize("weights", ["f32", "q4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_density_one_is_dense(family: str, weights: str, packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path(family, weights))
    c, model = packed.config, Model(packed, 2, dense=True)
    layers, neurons = c.num_hidden_layers, c.intermediate_size
    every = np.full((layers, neurons), -1, np.float32)
    router = selected(random, packed, "router").predictor
    assert router
    dense = decoded(model)
    for selection in (
        Selection("gate+down", gate=every, down=every),
        Selection("top", top=np.full(layers, neurons, np.int32)),
        Selection("router", predictor=dataclasses.replace(router, bias=np.full_like(router.bias, np.inf)), window=3),
    ):
        model.engine.select(selection, dense=True)
        np.testing.assert_array_equal(decoded(model), dense)
        assert (model.engine.neurons_read() == neurons).all()


def test_a_layer_may_drop_everything(packed_path: PackedPath) -> None:
    packed = open_packed(packed_path("llama", "q4"))
    model, shape = Model(packed, 2), (packed.config.num_hidden_layers, packed.config.intermediate_size)
    for part in ("gate", "down"):
        model.engine.select(Selection(part, **{part: np.full(shape, np.inf, np.float32)}))
        assert np.isfinite(decoded(model)).all()
        assert (model.engine.neurons_read()[:, 2] == 0).all()


def test_a_selection_is_taken_back(packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path("llama-relu", "q4"))
    assert packed.config.hidden_act in EXACT_ZEROS
    model = Model(packed, 2)
    before = decoded(model)
    model.engine.select(Selection("gate", gate=thresholds(random, packed, 0.5)))
    assert (decoded(model) != before).any()
    model.engine.select(None)
    np.testing.assert_array_equal(decoded(model), before)


def test_what_cannot_be_used_is_refused(packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path("llama", "q4"))
    model, size = Model(packed, 1), (packed.config.num_hidden_layers, packed.config.intermediate_size)
    for wrong in (np.zeros(size[1], np.float32), np.zeros(size)):
        with pytest.raises(ValueError, match="gate is"):
            model.engine.select(Selection("gate", gate=wrong))
    guessed, top = (selected(random, packed, parts) for parts in ("lowrank", "top"))
    assert guessed.predictor
    for selection, why in (
        (dataclasses.replace(guessed, top=top.top), "exclude each other"),
        (Selection("x", predictor=dataclasses.replace(guessed.predictor, bias=guessed.predictor.bias[1:])), "bias is"),
        (dataclasses.replace(top, window=0), "incomplete"),
    ):
        with pytest.raises(ValueError, match=why):
            model.engine.select(selection)
