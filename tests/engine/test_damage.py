"""The damage of a selection against what can be worked out by hand, and its error against many samples."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from fakes import ScriptedModel
from fewfire import damage
from fewfire.damage import Damage, clustered_error, log_total, measure, observe_dense, perplexity_growth

WINDOWS = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]


class Table(ScriptedModel):
    """Its prediction depends on the last token alone, and on `self.table`, `(vocab, vocab)`."""

    def __init__(self, vocab: int, spread: float = 3.0) -> None:
        super().__init__(vocab_size=vocab)
        self.table = np.random.default_rng(0).standard_normal((vocab, vocab)).astype(np.float32) * spread
        self.bytes_read = 70

    def logits_after(self, tokens: list[int]) -> np.ndarray:
        return self.table[tokens[-1]]

    def p(self) -> np.ndarray:
        found = np.exp(self.table.astype(np.float64))
        return found / found.sum(axis=1, keepdims=True)


def test_the_whole_divergence_of_a_small_vocabulary() -> None:
    model = Table(60)
    dense, p = observe_dense(model, WINDOWS), model.p()
    model.table = model.table + np.random.default_rng(1).standard_normal(model.table.shape).astype(np.float32)
    found, q = measure(model, WINDOWS, dense), model.p()
    pairs = [(a, b) for window in WINDOWS for a, b in pairwise(window)]
    np.testing.assert_allclose(found.kl, [(p[a] * np.log(p[a] / q[a])).sum() for a, _ in pairs], rtol=1e-5)
    np.testing.assert_allclose(found.grown, [np.log(p[a, b] / q[a, b]) for a, b in pairs], rtol=1e-5, atol=1e-6)
    assert found.agree.tolist() == [p[a].argmax() == q[a].argmax() for a, _ in pairs]
    assert found.window.tolist() == [0, 0, 0, 1, 2, 2]
    assert found.growth == pytest.approx(math.exp(found.grown.mean()) - 1)
    assert found.bytes_per_token == 70
    assert (found.seconds > 0).all()


def test_of_a_large_vocabulary_some_tokens_stand_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The damage is in the rest here, whose sum is kept, as a screened head does it."""
    monkeypatch.setattr(damage, "_KEPT", 200)
    model, random = Table(3000, spread=1.0), np.random.default_rng(1)
    dense, p = observe_dense(model, WINDOWS), model.p()
    assert dense.tokens.shape == (6, 400)
    np.testing.assert_allclose(dense.weight.sum(axis=1), 1, rtol=1e-5)
    noise = random.standard_normal(model.table.shape).astype(np.float32) - np.float32(0.5)  # E exp(noise) = 1
    tokens = [3, 4, 5, 7, 9, 10]
    for token in tokens:
        noise[token, np.argsort(-p[token])[:200]] = 0
    model.table = model.table + noise
    found, q = measure(model, WINDOWS, dense), model.p()
    exact = np.array([(p[token] * np.log(p[token] / q[token])).sum() for token in tokens])
    assert exact.min() > 0.1
    assert abs(found.kl.mean() / exact.mean() - 1) < 0.08
    assert np.abs(found.kl / exact - 1).max() < 0.5


def test_probability_that_has_moved_to_rare_tokens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "_KEPT", 200)
    model = Table(3000)
    dense, p = observe_dense(model, WINDOWS), model.p()
    tokens = [3, 4, 5, 7, 9, 10]
    for token in tokens:
        model.table[token, np.argsort(p[token])[:3]] += 20
    found, q = measure(model, WINDOWS, dense), model.p()
    exact = np.array([(p[token] * np.log(p[token] / q[token])).sum() for token in tokens])
    assert exact.min() > 0.005
    np.testing.assert_allclose(found.kl, exact, rtol=0.1)


def test_the_worse_half_of_the_windows() -> None:
    window, kl = np.array([0, 0, 1, 2, 2, 2]), np.array([0.1, 0.3, 0.5, 0.0, 0.0, 0.2])
    assert Damage(kl, kl, kl > 0, window, kl, 1.0).worse_kl == pytest.approx(0.9 / 3)
    assert Damage(kl, kl, kl > 0, 0 * window, kl, 1.0).worse_kl == pytest.approx(kl.mean())


def test_nothing_changed_is_no_damage_at_all() -> None:
    for vocab in (60, 3000):
        model = Table(vocab)
        found = measure(model, WINDOWS, observe_dense(model, WINDOWS))
        assert (found.growth, found.error) == (0, 0)
        assert not found.kl.any()
        assert found.agree.all()


def test_a_ruined_model_has_a_finite_growth() -> None:
    model = Table(60)
    dense = observe_dense(model, WINDOWS)
    model.table = model.table * 3000
    found = measure(model, WINDOWS, dense)
    assert found.grown.mean() > 710
    assert 1e300 < found.growth < math.inf


def test_the_error_is_how_far_samples_scatter_if_tokens_of_a_window_are_alike() -> None:
    """And not what it would be if all tokens were independent, which is less than half of it."""
    random, counts = np.random.default_rng(2), np.array([20, 10, 30] * 8)
    window = np.repeat(np.arange(24), counts)
    growths, errors = [], []
    for _ in range(400):
        grown = 0.02 + 0.05 * random.standard_normal(24)[window] + 0.1 * random.standard_normal(len(window))
        found = Damage(grown, grown, grown > 0, window, grown, 1.0)
        growths.append(found.growth)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(growths), rel=0.15)
    naive = 0.1118 / math.sqrt(len(window))
    assert np.mean(errors) > 2 * naive


def test_growth_and_its_error() -> None:
    counts = np.array([2, 2, 1])
    growth, error = perplexity_growth(np.array([0.3, 0.4, 0.5]), counts)
    assert growth == pytest.approx(math.exp(1.2 / 5) - 1)
    apart = np.array([0.3, 0.4, 0.5]) - 0.24 * counts
    assert error == pytest.approx((1 + growth) * math.sqrt((apart**2).sum() * 1.5) / 5)
    even = perplexity_growth(np.array([0.2, 0.2, 0.1]), counts)
    assert even == pytest.approx((math.exp(0.1) - 1, 0), abs=1e-9)  # every window grows alike
    assert clustered_error(np.array([0.3]), np.array([2])) == math.inf


def test_log_total_of_large_logits() -> None:
    logits = np.array([[1000.0, 1000.0], [0.0, 2000.0]], np.float32)
    np.testing.assert_allclose(log_total(logits), [1000 + math.log(2), 2000])
    assert float(log_total(logits[0])) == pytest.approx(1000 + math.log(2))
