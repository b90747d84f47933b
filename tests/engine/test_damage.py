"""The damage of a selection against what can be worked out by hand, and its error against many samples."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

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
        self.engine = SimpleNamespace(bytes_read=lambda: 70)

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


def test_of_a_large_vocabulary_the_rest_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "_KEPT", 10)
    model = Table(60)
    dense, p = observe_dense(model, WINDOWS), model.p()
    model.table = model.table + np.random.default_rng(1).standard_normal(model.table.shape).astype(np.float32)
    found, q = measure(model, WINDOWS, dense), model.p()
    for kl, token in zip(found.kl, [3, 4, 5, 7, 9, 10], strict=True):
        best = np.argsort(-p[token])[:10]
        a, b = np.append(p[token][best], 1 - p[token][best].sum()), np.append(q[token][best], 1 - q[token][best].sum())
        assert kl == pytest.approx((a * np.log(a / b)).sum(), rel=1e-4)
        assert 0 < kl < (p[token] * np.log(p[token] / q[token])).sum()


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
