"""Thresholds keep the share that they promise, and cost what the exact output says."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.selectors import threshold

T, NEURONS, HIDDEN = 400, 96, 24


@pytest.fixture
def layer() -> dict[str, np.ndarray]:
    """A layer whose neurons differ in how large they are, and in what they do to the output."""
    random = np.random.default_rng(0)
    gate = random.standard_normal((T, NEURONS)).astype(np.float32)
    up = random.standard_normal((T, NEURONS)).astype(np.float32) * np.geomspace(0.2, 5, NEURONS).astype(np.float32)
    down = random.standard_normal((HIDDEN, NEURONS)).astype(np.float32)
    down *= random.permutation(np.geomspace(0.2, 5, NEURONS)).astype(np.float32)
    residual = random.standard_normal((T, HIDDEN)).astype(np.float32)
    return {"gate": gate, "up": up, "fired": gate * up, "down": down, "residual": residual}


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_wanted_share_is_kept(layer: dict[str, np.ndarray], density: float, weighted: bool) -> None:
    weights = threshold.gate_weights(layer["up"], layer["down"]) if weighted else None
    kept = threshold.keep(layer["gate"], threshold.thresholds(layer["gate"], density, weights))
    assert kept.mean() == pytest.approx(density, abs=1e-4)


def test_density_one_keeps_zeros_too() -> None:
    values = np.zeros((3, 4), np.float32)
    assert threshold.keep(values, threshold.thresholds(values, 1.0)).all()
    weights = np.array([0, 1, 2, 3], np.float32)
    assert threshold.keep(values, threshold.thresholds(values, 1.0, weights)).all()


def test_a_neuron_without_weight_goes_first() -> None:
    values = np.ones((5, 4), np.float32)
    values[:, 0] = 100
    kept = threshold.keep(values, threshold.thresholds(values * [1, 1, 1.1, 1.2], 0.75, np.array([0, 1, 1, 1.0])))
    assert not kept[:, 0].any()


def test_cut_and_per_neuron_thresholds_agree(layer: dict[str, np.ndarray]) -> None:
    weights = threshold.gate_weights(layer["up"], layer["down"])
    cut = threshold.cuts(layer["gate"], (0.3,), weights)[0]
    kept = threshold.keep(layer["gate"], threshold.per_neuron(cut, weights))
    assert (kept != (np.abs(layer["gate"]) * weights > cut)).sum() <= 1  # the largest that is dropped, by rounding


def test_weights_lower_the_error(layer: dict[str, np.ndarray]) -> None:
    energy = threshold.energy(layer["residual"], layer["fired"] @ layer["down"].T)

    def errors(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return threshold.curve(values, weights, layer["fired"], layer["down"], energy, (0.2, 0.5, 0.8)).errors

    alike = np.ones(NEURONS, np.float32)
    weighted = threshold.gate_weights(layer["up"], layer["down"])
    assert (errors(layer["gate"], weighted) < 0.7 * errors(layer["gate"], alike)).all()
    norms = threshold.down_weights(layer["down"])
    assert (errors(layer["fired"], norms) < 0.7 * errors(layer["fired"], alike)).all()
    assert (errors(layer["fired"], norms) < errors(layer["gate"], weighted)).all()  # knowing up is better


def test_the_error_is_that_of_the_output(layer: dict[str, np.ndarray]) -> None:
    dense = layer["fired"] @ layer["down"].T
    energy = threshold.energy(layer["residual"], dense)
    weights = threshold.down_weights(layer["down"])
    found = threshold.curve(layer["fired"], weights, layer["fired"], layer["down"], energy, (0.25, 1.0))
    kept = threshold.keep(layer["fired"], found.thresholds(0.25))
    sparse = np.where(kept, layer["fired"], 0) @ layer["down"].T
    after = layer["residual"] + dense
    ratio = np.square(sparse - dense).sum(axis=1) / np.square(after).sum(axis=1)
    assert found.errors[0] == pytest.approx(ratio.mean(), rel=1e-3)
    assert found.errors[1] == 0


def test_a_norm_of_its_own_scales_the_error(layer: dict[str, np.ndarray]) -> None:
    output = layer["fired"] @ layer["down"].T
    plain = threshold.energy(layer["residual"], output)
    np.testing.assert_allclose(threshold.energy(layer["residual"], 1000 * output, output), plain * 1e6, rtol=1e-4)


def test_a_curve_between_its_points(layer: dict[str, np.ndarray]) -> None:
    weights = threshold.down_weights(layer["down"])
    found = threshold.curve(layer["fired"], weights, layer["fired"], layer["down"], np.ones(T, np.float32))
    assert (np.diff(found.errors) < 0).all()
    for density in (0.12, 0.35, 0.77, 0.95):
        kept = threshold.keep(layer["fired"], found.thresholds(density))
        assert kept.mean() == pytest.approx(density, abs=0.02)
    assert threshold.keep(layer["fired"], found.thresholds(1.0)).all()
    assert found.error(1.0) == 0
    assert found.error(0.3) > found.error(0.31)


def test_impossible_densities(layer: dict[str, np.ndarray]) -> None:
    for density in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="density must be"):
            threshold.thresholds(layer["gate"], density)
    weights = threshold.down_weights(layer["down"])
    found = threshold.curve(layer["gate"], weights, layer["fired"], layer["down"], np.ones(T, np.float32), (0.5, 1.0))
    with pytest.raises(ValueError, match=r"at least 0\.5"):
        found.thresholds(0.4)
