"""Methods at densities: measured on text that they were not fitted to, and nothing is left behind in the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest

import tiny
from decoding import decoded
from fewfire import calibration, choosing, damage
from fewfire.calibration import Calibration
from fewfire.model import Model
from fewfire.packed import Packed
from fewfire.selectors import Selection, store
from fewfire.tradeoff import Judge, tradeoff

TEXT = tiny.PARAGRAPH * 6


@pytest.fixture
def model(own_packed: Callable[[str, str], Packed], monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model of the test's own."""
    monkeypatch.setattr(calibration, "_WINDOW", 64)
    return Model(own_packed("llama", "q4"), 1, dense=True)


def test_points(model: Model) -> None:
    dense, stages = decoded(model), set[str]()
    found = tradeoff(
        model, ["down", "screen"], [1, 0.6], text=TEXT, tokens=130, progress=lambda stage, *_: stages.add(stage)
    )
    assert [(p.method, p.asked) for p in found.points] == [("down", 1), ("down", 0.6), ("screen", 1), ("screen", 0.6)]
    everything, some, *screened = found.points
    assert (everything.growth, everything.kl, everything.agreement, everything.density) == (
        0,
        pytest.approx(0, abs=1e-8),
        1,
        1,
    )
    assert everything.bytes_per_token == found.dense_bytes_per_token
    assert some.density == pytest.approx(0.6, abs=0.05)
    assert some.kl > 0
    assert some.bytes_per_token < found.dense_bytes_per_token
    assert (some.missed, everything.missed) == (None, None)
    assert all(point.missed is not None for point in screened)
    assert found.tokens == 126, "two whole windows"
    assert {"measuring down at 0.6", "measuring screen at 1", "measuring dense"} <= stages
    assert json.loads(json.dumps(found.to_dict()))["points"][1]["densities"] == some.densities
    np.testing.assert_array_equal(decoded(model), dense)
    assert store.about(model.packed) is None


def test_what_judges_was_not_fitted_to(model: Model) -> None:
    """The same as measuring by hand on the held-out windows."""
    found = tradeoff(model, ["gate"], [0.5], text=TEXT, tokens=10_000).points[0]
    work = Calibration(model, TEXT)
    model.engine.select(None, dense=True)
    dense = damage.observe_dense(model, work.held)
    model.engine.select(work.selection("gate", found.densities))
    by_hand = damage.measure(model, work.held, dense)
    assert (found.growth, found.agreement) == (by_hand.growth, by_hand.agree.mean())
    other = Judge(work, work.fitted[:2]).points("gate", [0.5], choosing.uniform(work, "gate"))[0]
    assert len(set(other.densities["gate"])) == 1
    assert other.growth != found.growth


@pytest.mark.parametrize(
    ("methods", "densities", "tokens", "words"),
    [
        (["magic"], [0.5], 100, "unknown method"),
        (["gate"], [0.5, 0.0], 100, "density must be over 0"),
        (["gate"], [0.5], 1, "at least 2"),
    ],
)
def test_impossible_options(model: Model, methods: list[str], densities: list[float], tokens: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tradeoff(model, methods, densities, text=TEXT, tokens=tokens)
    Calibration(model, TEXT)  # which nobody has open


def test_what_is_compiled_without_a_selection_is_reported(model: Model) -> None:
    progress = mock.Mock()
    work = Calibration(model, TEXT, progress)
    with mock.patch.object(model.engine, "select", wraps=model.engine.select) as select:
        work.dense("held", work.held[:1])
        assert Judge(work, work.held[:1]).dense
    assert select.call_args_list == 2 * [mock.call(None, progress=progress)]


def test_what_was_selected_comes_back(model: Model) -> None:
    layers, neurons = model.config.num_hidden_layers, model.config.intermediate_size
    model.engine.select(Selection("gate", gate=np.full((layers, neurons), 0.1, np.float32)))
    before = decoded(model)
    with mock.patch.object(Judge, "points", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        tradeoff(model, ["gate"], [0.5], text=TEXT)
    np.testing.assert_array_equal(decoded(model), before)
