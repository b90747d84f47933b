"""Fitted screens: as near to the head as their bits can be, with biases that keep the whole probability, and costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from scipy import linalg

from fewfire.model import Model
from fewfire.observe import Observation, head_rows
from fewfire.packed import Packed, open_packed
from fewfire.quantize import FORMATS
from fewfire.selectors import Selection, screen
from fewfire.selectors.fits import Fit
from fewfire.selectors.parts import flatten, misfit
from tiny import prompt

PackedPath = Callable[[str, str], Path]
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def wide(shaped_path: Callable[..., Path]) -> Callable[[str], Packed]:
    """A model with more directions than a screen has, packed in a format."""
    return lambda weights: open_packed(shaped_path(weights, **WIDE))


def observation(states: np.ndarray) -> Observation:
    """As one is after its last layer."""
    return cast(Observation, SimpleNamespace(final=states))


def drawn(random: np.random.Generator, hidden: int) -> np.ndarray:
    """Normal final hidden states whose directions differ in size, and whose mean is not zero: `(T, hidden)`."""
    mix = np.linalg.qr(random.standard_normal((hidden, hidden)))[0] * np.geomspace(1.5, 0.1, hidden)
    mean = 0.4 * random.standard_normal(hidden)
    return (random.standard_normal((6000, hidden)) @ mix.T + mean).astype(np.float32)


@pytest.fixture
def states(random: np.random.Generator) -> np.ndarray:
    """Of the tiny models."""
    return drawn(random, 64)


def fitted(packed: Packed, states: np.ndarray, rank: int = 64) -> Fit:
    return screen.fit(packed, observation(states), rank)


def screened(packed: Packed, fit: Fit, states: np.ndarray) -> np.ndarray:
    found = screen.fill(packed, [fit], [1.0])
    return screen.screened(found, *screen.reduced(packed, found, states))


def log_total(logits: np.ndarray) -> Any:
    return np.log(np.exp(logits.astype(np.float64)).sum(axis=1))


@pytest.mark.parametrize("weights", ["q4", "f32"])
@pytest.mark.parametrize("rank", [64, 192])
def test_as_near_as_its_bits_allow(
    weights: str, rank: int, wide: Callable[[str], Packed], random: np.random.Generator
) -> None:
    """Of the singular values of W C^1/2 without the mean row, the largest keep what levels lose, the last all of it."""
    packed, states = wide(weights), drawn(random, 256)
    used, head = states[:4500], head_rows(packed)
    found = screened(packed, fitted(packed, states, rank), used)
    lacking = used @ head.T - found
    error = np.square(lacking - lacking.mean(axis=0)).sum(axis=1).mean()
    values = linalg.svdvals((used - used.mean(axis=0)) @ (head - head.mean(axis=0)).T / len(used) ** 0.5)
    lost = np.concatenate([np.full(64, 0.0115), np.full(rank - 64, 0.1188), np.ones(len(values) - rank)])
    assert error == pytest.approx((lost * np.square(values)).sum(), rel=0.1)


def test_the_bias_keeps_the_partition_function(wide: Callable[[str], Packed], random: np.random.Generator) -> None:
    packed, states = wide("f32"), drawn(random, 256)
    fit = fitted(packed, states)
    held, bias = states[4500:], fit["bias"]
    found, exact = screened(packed, fit, held) - bias, log_total(held @ head_rows(packed).T)
    used = states[:4500]
    mean = (used @ head_rows(packed).T - screened(packed, fit, used)).mean(axis=0) + bias
    gap = abs((log_total(found + bias) - exact).mean())
    assert gap < 0.05
    for without in (np.zeros_like(mean), mean):  # no bias at all; no variance
        assert abs((log_total(found + without) - exact).mean()) > max(0.1, 3 * gap)


@pytest.mark.parametrize("weights", ["q4", "f32"])
@pytest.mark.parametrize("block", [100, 4096])
def test_costs_are_what_plain_formulas_say(
    weights: str, block: int, packed_path: PackedPath, states: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "_BLOCK", block)
    packed = open_packed(packed_path("llama", weights))
    fit, held = fitted(packed, states), states[-1500:]
    cheap = screened(packed, fit, held)
    exact = (held @ head_rows(packed).T).astype(np.float64)
    for i, margin in enumerate(fit["margins"]):
        candidates = cheap >= log_total(cheap)[:, None] - margin
        logits = np.where(candidates, exact, cheap)
        p, q = (each - log_total(each)[:, None] for each in (exact, logits))
        assert candidates.mean() == pytest.approx(fit["densities"][i], abs=1e-5)
        assert (np.exp(p) * (p - q)).sum(axis=1).mean() == pytest.approx(fit["errors"][i], rel=0.02, abs=1e-5)
        missed = 1 - np.take_along_axis(candidates, exact.argmax(axis=1)[:, None], axis=1).mean()
        if np.isfinite(margin):
            assert missed < fit["missed"][i] < missed + 0.03


@pytest.mark.parametrize("weights", FORMATS)
def test_a_fit_is_a_curve_and_a_screen_that_fits(weights: str, packed_path: PackedPath, states: np.ndarray) -> None:
    packed = open_packed(packed_path("gemma3", weights))
    fit = fitted(packed, states)
    assert (np.diff(fit["densities"]) > 0).all()
    assert fit["densities"][-1] == 1
    assert (np.diff(fit["errors"]) <= 0).all()
    assert fit["errors"][-1] == fit["missed"][-1] == 0
    assert (np.diff(fit["margins"]) > 0).all()
    assert fit["margins"][-1] == np.inf
    assert all(len(fit[name]) == len(fit["densities"]) for name in ("errors", "margins", "missed"))
    for density in (float(fit["densities"][0]), 0.3, 1.0):
        found = screen.fill(packed, [fit], [density])
        assert misfit(packed, *flatten(Selection("screen", screen=found))) == ""
        assert np.isinf(found.margin) == (density == 1)


def test_margins_are_interpolated(packed_path: PackedPath) -> None:
    packed, none = open_packed(packed_path("llama", "q4")), np.zeros(0)
    curve = {"densities": np.array([0.1, 0.3, 1]), "margins": np.array([2, 4, np.inf]), "rank": np.array(64)}
    fit = {**curve, **dict.fromkeys(("codes", "scales", "basis", "centre", "bias"), none)}
    for density, margin in ((0.1, 2), (0.2, 3), (0.3, 4), (0.31, np.inf), (1, np.inf)):
        assert screen.fill(packed, [fit], [density]).margin == pytest.approx(margin)
    for density in (0.09, 1.01):
        with pytest.raises(ValueError, match=r"density must be from 0\.1"):
            screen.fill(packed, [fit], [density])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_engine_makes_the_share_exact(family: str, packed_path: PackedPath) -> None:
    """On the sample itself, observed as a calibration does."""
    packed = open_packed(packed_path(family, "q4"))
    windows = [prompt(100, seed=seed) for seed in range(12)]
    seen = Observation(packed, windows)
    for _ in seen:
        pass
    fit = screen.fit(packed, seen)
    model = Model(packed, 2)
    model.engine.select(Selection("screen", screen=screen.fill(packed, [fit], [0.4])))
    counts = []
    for window in windows[-3:]:
        session = model.session()
        for token in window:
            session.feed([token])
            counts.append(int(model.engine._work.exact.sum()) / packed.config.vocab_size)
    assert np.mean(counts) == pytest.approx(0.4, abs=0.05)


def test_few_states_are_enough(packed_path: PackedPath, states: np.ndarray) -> None:
    """Fewer than directions: the covariance alone could not be inverted."""
    packed = open_packed(packed_path("llama", "q4"))
    fit = screen.fit(packed, observation(states[:20]))
    assert all(np.isfinite(fit[name]).all() for name in ("densities", "errors", "missed", "scales", "bias"))


def test_the_bound_of_what_is_missed() -> None:
    assert screen._at_most(np.array([0]), 100) == pytest.approx(1 - 0.05**0.01)
    assert screen._at_most(np.array([5]), 100) == pytest.approx(0.1023, abs=1e-4)  # of any table
    assert screen._at_most(np.array([7]), 7) == 1


def test_ranks_grow_with_the_hidden_size() -> None:
    assert [screen.usual_rank(hidden) for hidden in (40, 64, 576, 2048, 4096)] == [64, 64, 448, 1600, 3264]


def test_where_all_tokens_are_alike_some_are_exact(packed_path: PackedPath, states: np.ndarray) -> None:
    """Margins under which no token is probable enough are no choice."""
    fit = fitted(open_packed(packed_path("llama", "f32")), states * np.float32(0.01))
    assert (fit["densities"] > 0).all()
    assert fit["densities"][-1] == 1
    assert len(fit["densities"]) == len(fit["margins"]) == len(fit["errors"]) == len(fit["missed"])
