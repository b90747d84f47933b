"""What is fitted keeps what it should, counts its own rounding, and becomes a predictor that keeps a given share."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import planted
from fewfire import reference
from fewfire.config import Activation
from fewfire.observe import Layer
from fewfire.quantize import decode, row_bytes
from fewfire.selectors import Selection, lowrank, threshold
from fewfire.selectors.fits import ffn_energy
from fewfire.selectors.parts import flatten, misfit
from fewfire.selectors.predicted import predicted
from fewfire.selectors.scores import held_out


@pytest.fixture
def layer(random: np.random.Generator) -> Layer:
    return planted.layer(random)


@pytest.mark.parametrize("weights", ["f32", "q8", "q4"])
def test_the_wanted_share_is_kept(layer: Layer, weights: str) -> None:
    packed = planted.packed(weights)
    fit = lowrank.fit(packed, layer, rank=16)
    held = held_out(len(layer.fired))
    for density in (0.05, 0.1, 0.33, 0.5, 0.85, 0.97):
        predictor = lowrank.fill(packed, [fit], [density])
        assert predicted(predictor, packed.formats, layer)[held].mean() == pytest.approx(
            density,
            abs=0.02 if density in fit["densities"] else 0.04,  # cuts between measured ones are interpolated
        )
    assert predicted(lowrank.fill(packed, [fit], [1.0]), packed.formats, layer).all()
    assert not misfit(packed, *flatten(Selection("lowrank", predictor=lowrank.fill(packed, [fit], [0.5]))))


def test_the_error_is_that_of_what_is_kept(layer: Layer) -> None:
    packed = planted.packed("q4")
    fit, held = lowrank.fit(packed, layer, rank=16), held_out(len(layer.fired))
    kept = predicted(lowrank.fill(packed, [fit], [0.5]), packed.formats, layer)
    lost = np.where(kept, 0, layer.fired) @ layer.tensors["down.weight"].T
    after = layer.residual + layer.fired @ layer.tensors["down.weight"].T
    ratio = np.square(lost).sum(axis=1) / np.square(after).sum(axis=1)
    assert np.interp(0.5, fit["densities"], fit["errors"]) == pytest.approx(ratio[held].mean(), rel=0.01)


def test_errors_fall(layer: Layer) -> None:
    packed = planted.packed()
    fit = lowrank.fit(packed, layer, rank=16)
    assert (np.diff(fit["errors"]) <= 0).all()
    assert fit["errors"][-1] == 0
    assert (np.diff(fit["densities"]) > 0).all()
    assert np.interp(0.3, fit["densities"], fit["errors"]) < 0.6 * fit["errors"][0]  # chance: 0.7 / 0.95 of it


def test_scores_beat_guessed_gates_of_the_same_rank(layer: Layer) -> None:
    """They know what up and down make of a gate."""
    packed, held = planted.packed(), held_out(len(layer.fired))
    fit = lowrank.fit(packed, layer, rank=4)
    seen, z = layer.ffn_in @ layer.tensors["gate.weight"].T, layer.ffn_in @ decode(fit["basis"], "f32", "dot", 128).T
    z = np.column_stack([z, np.ones(len(z), np.float32)])
    guess = z @ np.linalg.lstsq(z[~held], seen[~held], rcond=None)[0]
    size = np.abs(guess / (1 + np.exp(-guess)))[held]
    lost = threshold.left_out(
        layer.fired[held],
        size > np.quantile(size, 0.7),
        layer.tensors["down.weight"],
        ffn_energy(packed, layer)[held],
    )
    assert np.interp(0.3, fit["densities"], fit["errors"]) < lost


@pytest.mark.parametrize("act", ["relu", "fatrelu", "centred_silu"])
def test_a_planted_gate_is_found(random: np.random.Generator, act: Activation) -> None:
    """Who fires is known exactly, with the gates' bias and the activation function's threshold and centre."""
    packed, layer = planted.packed("q8", act), planted.layer(random, act, rank=8)
    held = held_out(len(layer.fired))
    fires = (layer.gate != 0)[held]
    assert fires.mean() == pytest.approx(0.2, abs=0.02)
    fit = lowrank.fit(packed, layer, rank=8)
    kept = predicted(lowrank.fill(packed, [fit], [1.3 * fires.mean()]), packed.formats, layer)[held]
    assert (kept & fires).sum() / fires.sum() > 0.998


@pytest.mark.parametrize("act", ["fatrelu", "fatsilu", "centred_silu"])
def test_the_onset_is_where_a_gate_begins_to_fire(random: np.random.Generator, act: Activation) -> None:
    config, limits = planted.packed(act=act).config, random.uniform(0.05, 2, (1, 100)).astype(np.float32)
    tensors = {"act_threshold.weight": limits[0]}
    if act == "centred_silu":
        tensors["act_centre.weight"] = random.uniform(-0.27, 0.3, 100).astype(np.float32)
    onset = lowrank._onset(config, SimpleNamespace(tensors=tensors))  # type: ignore[arg-type]
    below, above = (reference.activate(config, onset + step, *tensors.values()) for step in (-1e-2, 1e-2))
    assert (below == 0).all()
    assert (above > 0).all()


def test_rounding_is_counted(layer: Layer) -> None:
    errors = {}
    for weights in ("f32", "q8", "q4"):
        fit = lowrank.fit(planted.packed(weights), layer, rank=16)
        assert fit["rows"].shape == (planted.NEURONS, row_bytes(weights, 16))
        assert fit["basis"].shape == (16, row_bytes(weights, planted.HIDDEN))
        errors[weights] = np.interp(0.3, fit["densities"], fit["errors"])
    assert errors["q8"] == pytest.approx(errors["f32"], rel=0.05)
    assert errors["q4"] == pytest.approx(errors["f32"], rel=0.3)
    assert errors["q4"] != errors["q8"] != errors["f32"]


def test_rank_and_input_matter(layer: Layer) -> None:
    def error(**options: object) -> float:
        fit = lowrank.fit(planted.packed(), layer, **options)  # type: ignore[arg-type]
        return float(np.interp(0.3, fit["densities"], fit["errors"]))

    assert error(rank=8) < error(rank=2)
    assert error(rank=8) < error(rank=8, inputs=layer.attn_in)


def test_too_low_a_density(layer: Layer) -> None:
    packed = planted.packed()
    fit = lowrank.fit(packed, layer, rank=8)
    with pytest.raises(ValueError, match=r"at least 0\.05"):
        lowrank.fill(packed, [fit], [0.01])
    with pytest.raises(ValueError, match="density must be"):
        lowrank.fill(packed, [fit], [1.5])


def test_the_usual_rank() -> None:
    assert [lowrank.rank_of(hidden, 1 << 20) for hidden in (48, 64, 576, 2048, 4096)] == [48, 64, 64, 256, 512]
    assert [lowrank.rank_of(2048, tokens) for tokens in (10, 3072, 6144, 8192)] == [64, 64, 192, 256]
