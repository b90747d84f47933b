"""The closed form is the best there is, refinement only helps, and cuts keep what they say."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.selectors import scores
from fewfire.selectors.scores import Linear

T, HIDDEN, OUTPUTS = 600, 24, 40


@pytest.fixture
def problem(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of very different sizes whose largest ones matter least, and targets that are linear in them, nearly."""
    sizes = np.geomspace(1, 0.1, HIDDEN)
    x = random.standard_normal((T, HIDDEN)) * sizes + 3
    matrix = random.standard_normal((HIDDEN, OUTPUTS)) * np.geomspace(0.1, 10, HIDDEN)[:, None]
    y = x @ matrix + random.standard_normal((T, OUTPUTS))
    return x.astype(np.float32), y.astype(np.float32)


def left(features: np.ndarray, y: np.ndarray) -> float:
    """The squared error of predicting y by least squares from features and an intercept."""
    z = np.column_stack([features, np.ones(len(features))]).astype(np.float64)
    return float(np.square(y - z @ np.linalg.lstsq(z, y.astype(np.float64), rcond=None)[0]).sum())


def test_reduced_rank_is_the_optimum(problem: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = problem
    centred, wanted = (x - x.mean(axis=0)).astype(np.float64), (y - y.mean(axis=0)).astype(np.float64)
    fitted = centred @ np.linalg.lstsq(centred, wanted, rcond=None)[0]
    floor, spectrum = np.square(wanted - fitted).sum(), np.linalg.svd(fitted, compute_uv=False) ** 2
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    for rank in (1, 4, 12, HIDDEN):
        functions = scores.reduced_rank(x, y, rank)
        best = floor + spectrum[rank:].sum()  # Eckart and Young on what least squares predicts
        assert left(x @ functions.T, y) == pytest.approx(best, rel=0.02)
        assert left(x @ functions.T, y) <= 1.001 * left(x @ axes[:rank].T, y)  # principal components of the inputs
        np.testing.assert_allclose(np.cov((x @ functions.T).T), np.eye(rank).squeeze(), atol=0.1)


def test_worth_is_damage_less_price() -> None:
    damage = np.arange(20, dtype=np.float32).reshape(4, 5)
    worth = scores.benefits(damage, 0.3)
    np.testing.assert_allclose(worth, damage / 14 - 1, rtol=1e-6)
    assert scores.benefits(damage * 1e9 + (damage > 18) * 1e15, 0.3).max() == 100


def test_worth_of_nothing() -> None:
    worth = scores.benefits(np.zeros((8, 4), np.float32), 0.0)
    assert np.isfinite(worth).all()
    found = scores.refined(scores.constant(worth, 3), np.ones((8, 3), np.float32), worth)
    assert np.isfinite(found.rows).all()
    assert (found.bias < 0).all()


def drawn(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, what reading is worth, and the weights of the score that says so, but for noise."""
    features = random.standard_normal((2000, 6), np.float32)
    weights = random.standard_normal((30, 6), np.float32)
    damage = np.exp(features @ weights.T + random.standard_normal((2000, 30), np.float32) / 2)
    return features, scores.benefits(damage, 0.3), weights


def test_refining_lowers_the_loss_of_every_neuron(random: np.random.Generator) -> None:
    features, worth, weights = drawn(random)
    start = scores.constant(worth, 6)
    before = scores.losses(start, features, worth)
    for steps in (1, 2, 4, 8):
        found = scores.refined(start, features, worth, steps)
        after = scores.losses(found, features, worth)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert after.mean() < 0.5 * scores.losses(start, features, worth).mean()
    aligned = np.einsum("nf,nf->n", found.rows, weights) / np.linalg.norm(found.rows, axis=1)
    assert np.median(aligned / np.linalg.norm(weights, axis=1)) > 0.95


def test_refining_survives_features_that_are_not_white(random: np.random.Generator) -> None:
    features, worth, _ = drawn(random)
    start = scores.constant(worth, 6)
    found = scores.refined(start, 30 * features, worth)
    assert (scores.losses(found, 30 * features, worth) <= scores.losses(start, features, worth) * (1 + 1e-5)).all()


def test_the_loss_is_that_of_the_formula(random: np.random.Generator) -> None:
    features, worth, weights = drawn(random)
    linear = Linear(weights, np.ones(30, np.float32))
    scored = (features @ weights.T + 1).astype(np.float64)
    expected = (np.abs(worth) * np.logaddexp(0, -np.sign(worth) * scored)).mean(axis=0)
    np.testing.assert_allclose(scores.losses(linear, features, worth), expected, rtol=1e-4)


def test_the_constant_is_the_best_one(random: np.random.Generator) -> None:
    features, worth, _ = drawn(random)
    best = scores.constant(worth, 6)
    for off in (-0.1, 0.1):
        other = best._replace(bias=best.bias + np.float32(off))
        assert scores.losses(best, features, worth).mean() < scores.losses(other, features, worth).mean()


def test_cuts(random: np.random.Generator) -> None:
    values = random.standard_normal((100, 30), np.float32)
    for density, cut in zip((0.0, 0.1, 0.5, 1.0), scores.cuts(values, (0.0, 0.1, 0.5, 1.0)), strict=True):
        assert (values > cut).mean() == pytest.approx(density, abs=1e-3)


@pytest.mark.parametrize("tokens", [40, 512, 8192])
def test_a_quarter_is_held_out(tokens: int) -> None:
    assert scores.held_out(tokens).mean() == pytest.approx(0.25, abs=0.03)


def test_guesses_of_known_targets_are_a_good_start(random: np.random.Generator) -> None:
    """Gates that are linear in the features leave nothing to learn but the price."""
    features, _, weights = drawn(random)
    seen = features @ weights.T - 2
    worth = scores.benefits(np.maximum(seen, 0) ** 2, 0.05)
    start = scores.guessed(seen, features, worth)
    assert (
        scores.losses(start, features, worth).mean() < scores.losses(scores.constant(worth, 6), features, worth).mean()
    )
    found = scores.refined(start, features, worth)(features)
    assert worth[found > 0].sum() > 0.85 * np.maximum(worth, 0).sum()


def test_a_guess_that_is_worse_than_none_is_not_used(random: np.random.Generator) -> None:
    features, worth, weights = drawn(random)
    found = scores.guessed(-(features @ weights.T), features, worth)
    fixed = scores.constant(worth, 6)
    assert (scores.losses(found, features, worth) <= scores.losses(fixed, features, worth) * (1 + 1e-5)).all()
