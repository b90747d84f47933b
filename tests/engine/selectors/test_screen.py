"""Fitted screens: the best of their rank, with biases that keep the whole probability, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from scipy import linalg

from fewfire import quantize
from fewfire.model import Model
from fewfire.observe import Observation, head_rows
from fewfire.packed import Packed, open_packed
from fewfire.quantize import FORMATS
from fewfire.selectors import Selection, screen
from fewfire.selectors.fits import Fit
from fewfire.selectors.parts import flatten, misfit
from tiny import prompt

PackedPath = Callable[[str, str], Path]
RANK = 24


def observation(states: np.ndarray) -> Observation:
    """As one is after its last layer."""
    return cast(Observation, SimpleNamespace(final=states))


@pytest.fixture
def states(random: np.random.Generator) -> np.ndarray:
    """Normal final hidden states whose directions differ in size, and whose mean is not zero: `(T, 64)`."""
    mix = np.linalg.qr(random.standard_normal((64, 64)))[0] * np.geomspace(1.5, 0.1, 64)
    mean = 0.4 * random.standard_normal(64)
    return (random.standard_normal((6000, 64)) @ mix.T + mean).astype(np.float32)


def fitted(packed: Packed, states: np.ndarray, rank: int = RANK) -> Fit:
    return screen.fit(packed, observation(states), rank)


def factors(packed: Packed, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Rows `(vocab, rank)` and basis `(rank, hidden)` as they are stored."""
    of, rank = packed.formats, int(fit["rank"])
    return (
        quantize.decode(fit["rows"], of.rows, "dot", rank),
        quantize.decode(fit["basis"], of.table, "dot", packed.config.hidden_size),
    )


def log_total(logits: np.ndarray) -> Any:
    return np.log(np.exp(logits.astype(np.float64)).sum(axis=1))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_best_of_its_rank(family: str, packed_path: PackedPath, states: np.ndarray) -> None:
    """What is lacking is what no matrix of this rank can have: the smallest singular values of W C^1/2."""
    packed = open_packed(packed_path(family, "f32"))
    rows, basis = factors(packed, fitted(packed, states))
    used, head = states[:4500], head_rows(packed)
    centred = used - used.mean(axis=0)
    error = np.square(centred @ (head - rows @ basis).T).sum(axis=1).mean()
    values = linalg.svdvals(centred @ head.T / len(centred) ** 0.5)
    least = np.square(values[RANK:]).sum()
    assert 0.99 * least < error < 1.02 * least


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_bias_keeps_the_partition_function(family: str, packed_path: PackedPath, states: np.ndarray) -> None:
    packed = open_packed(packed_path(family, "f32"))
    fit = fitted(packed, states, rank=8)
    rows, basis = factors(packed, fit)
    held, head = states[4500:], head_rows(packed)
    screened, mean = held @ basis.T @ rows.T, (head - rows @ basis) @ states[:4500].mean(axis=0)
    exact = log_total(held @ head.T)
    gap = abs((log_total(screened + fit["bias"]) - exact).mean())
    assert gap < 0.05
    for without in (np.zeros_like(mean), mean):  # no bias at all; no variance
        assert abs((log_total(screened + without) - exact).mean()) > max(0.1, 3 * gap)


@pytest.mark.parametrize("weights", ["q4", "f32"])
@pytest.mark.parametrize("block", [100, 4096])
def test_costs_are_what_plain_formulas_say(
    weights: str, block: int, packed_path: PackedPath, states: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "_BLOCK", block)
    packed = open_packed(packed_path("llama", weights))
    fit = fitted(packed, states)
    held, (rows, basis) = states[-1500:], factors(packed, fit)
    screened = screen._rounded(held @ basis.T, packed.formats.rows) @ rows.T + fit["bias"]
    exact = (held @ head_rows(packed).T).astype(np.float64)
    for i, margin in enumerate(fit["margins"]):
        candidates = screened >= log_total(screened)[:, None] - margin
        logits = np.where(candidates, exact, screened)
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
    curve = {"densities": np.array([0.1, 0.3, 1]), "margins": np.array([2, 4, np.inf]), "rank": np.array(3)}
    fit = {**curve, "rows": none, "basis": none, "bias": none}
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
    fit = screen.fit(packed, seen, RANK)
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
    assert all(np.isfinite(fit[name]).all() for name in ("densities", "errors", "missed", "bias"))


def test_the_bound_of_what_is_missed() -> None:
    assert screen._at_most(np.array([0]), 100) == pytest.approx(1 - 0.05**0.01)
    assert screen._at_most(np.array([5]), 100) == pytest.approx(0.1023, abs=1e-4)  # of any table
    assert screen._at_most(np.array([7]), 7) == 1


def test_ranks_grow_with_the_hidden_size() -> None:
    assert [screen.usual_rank(hidden) for hidden in (40, 64, 576, 2048, 4096)] == [40, 64, 256, 896, 1792]


def test_where_all_tokens_are_alike_some_are_exact(packed_path: PackedPath, states: np.ndarray) -> None:
    """Margins under which no token is probable enough are no choice."""
    fit = fitted(open_packed(packed_path("llama", "f32")), states * np.float32(0.01))
    assert (fit["densities"] > 0).all()
    assert fit["densities"][-1] == 1
    assert len(fit["densities"]) == len(fit["margins"]) == len(fit["errors"]) == len(fit["missed"])
