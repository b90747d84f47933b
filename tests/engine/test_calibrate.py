"""Calibrating tiny models from end to end: what is asked for is kept, and a killed one goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import tiny
from decoding import decoded
from fewfire import choosing, timing
from fewfire.calibrate import _within_budget, calibrate
from fewfire.calibration import Calibration
from fewfire.errors import FewfireError
from fewfire.kernels.compile import Compiled
from fewfire.model import Model
from fewfire.observe import Layer
from fewfire.packed import Packed, open_packed
from fewfire.progress import Progress
from fewfire.selectors import store
from fewfire.selectors.methods import KINDS, usual
from fewfire.selectors.selection import Selection

PackedPath = Callable[[str, str], Path]
TEXT = tiny.PARAGRAPH * 6
pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("method", ["gate", "down+gate"])
def test_a_density_is_what_the_kernels_read(model: Model, method: str) -> None:
    about = calibrate(model, method=method, density=0.5, text=TEXT)
    assert about.density == pytest.approx(0.5, abs=0.03)
    assert set(about.densities) == set(method.split("+"))
    assert about.bytes_per_token < about.dense_bytes_per_token == model.packed.bytes_per_token()
    assert about.missed is None
    again = Model(open_packed(model.path), 1)
    np.testing.assert_array_equal(decoded(again), decoded(model))
    assert (decoded(again) != decoded(Model(open_packed(model.path), 1, dense=True))).any()
    assert store.about(model.packed) == about
    assert not list(model.path.glob(".calibrating*"))


def test_every_stage_says_what_is_compiled_for_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a probe, a trial or the timing is the first to select something."""
    stages, compiling = list[str](), "compiling kernels for this CPU (only once)"
    monkeypatch.setattr(Compiled, "cached", False)
    calibrate(model, method="down", density=0.5, text=TEXT, progress=lambda stage, *_: stages.append(stage))
    before = {first.split(" (")[0] for first, second in pairwise(stages) if second == compiling != first}
    assert before >= {"adjusting down", "measuring dense", "timing"}
    after = {second.split(" (")[0] for first, second in pairwise(stages) if first == compiling != second}
    assert after >= {"probing down", "adjusting down", "measuring down", "timing"}


def test_density_one_is_dense(model: Model) -> None:
    dense = decoded(model)
    about = calibrate(model, method="gate+down", density=1, text=TEXT)
    assert (about.growth, about.agreement, about.density) == (0, 1, 1)
    np.testing.assert_array_equal(decoded(model), dense)


def test_the_bytes_of_a_dense_token(packed_path: PackedPath) -> None:
    for family, weights in (("llama", "q4"), ("opt", "q8"), ("gemma3", "f32")):
        model = Model(open_packed(packed_path(family, weights)), 1, dense=True)
        decoded(model)
        assert model.packed.bytes_per_token() == model.engine.bytes_read()


def test_a_budget(model: Model) -> None:
    with mock.patch.object(timing, "side_by_side", pretended):
        about = calibrate(model, budget=0.05, text=TEXT)
    assert about.growth < 0.05
    assert {each["method"] for each in about.tried} <= set(usual(model.packed))
    assert len(about.tried) > 1
    assert about.speedup > 1
    assert about.bytes_per_token < about.dense_bytes_per_token


def pretended(
    model: Model, selections: Sequence[Selection | None], window: Sequence[int], progress: Progress
) -> list[float]:
    """Times as if bytes were all that counts: those of a model this small say nothing."""
    session, found = model.session(), []
    for selection in selections:
        model.engine.select(selection, dense=selection is None)
        session.rewind(0)
        session.feed(window[:1])
        found.append(1e-9 * model.engine.bytes_read())
    return found


def test_nothing_slower_is_kept(model: Model) -> None:
    def slower(model: Model, selections: Sequence[Selection | None], *rest: object) -> list[float]:
        return [1.0] + [1.1] * (len(selections) - 1)

    with mock.patch.object(timing, "side_by_side", slower), pytest.raises(FewfireError, match="faster than no calibra"):
        calibrate(model, method="gate", budget=0.05, text=TEXT)
    assert store.about(model.packed) is None


def test_exact_zeros_are_no_merit_of_a_calibration(own_packed: Callable[[str, str], Packed]) -> None:
    """A selection must be faster than leaving out zeros, not only than dense."""
    model = Model(own_packed("opt", "q4"), 1)

    def no_faster(model: Model, selections: Sequence[Selection | None], *rest: object) -> list[float]:
        return [1.0] + [0.5] * (len(selections) - 1)

    with (
        mock.patch.object(timing, "side_by_side", no_faster),
        pytest.raises(FewfireError, match="faster than no calib"),
    ):
        calibrate(model, method="lowrank", budget=0.05, text=TEXT)


def test_a_budget_that_nothing_keeps(model: Model) -> None:
    with mock.patch.object(choosing, "within", return_value=None), pytest.raises(FewfireError, match="allow more"):
        calibrate(model, method="gate", budget=0.01, text=TEXT)
    assert store.about(model.packed) is None


@pytest.mark.parametrize("before", ["calibrated", "exact"])
def test_a_failed_calibration_leaves_the_model_as_it_was(before: str, own_packed: Callable[[str, str], Packed]) -> None:
    family = "llama-relu" if before == "exact" else "llama"
    model = Model(own_packed(family, "q4"), 1)
    if before == "calibrated":
        calibrate(model, method="gate", density=0.4, text=TEXT)
    expected, read = decoded(model), model.engine.neurons_read()
    assert (read < model.config.intermediate_size).any()
    failing = mock.patch("fewfire.trials.timing.side_by_side", side_effect=KeyboardInterrupt)
    with failing, pytest.raises(KeyboardInterrupt):
        calibrate(model, method="down", density=0.9, text=TEXT)
    np.testing.assert_array_equal(decoded(model), expected)
    np.testing.assert_array_equal(model.engine.neurons_read(), read)


def test_sessions_in_other_threads_wait_for_a_borrowed_engine(model: Model) -> None:
    expected, found = decoded(model), list[np.ndarray]()
    thread = threading.Thread(target=lambda: found.append(decoded(model)))
    layers, neurons = model.config.num_hidden_layers, model.config.intermediate_size
    with model.engine.borrowed():
        model.engine.select(Selection("nothing", down=np.full((layers, neurons), np.inf, np.float32)))
        thread.start()
        assert (decoded(model) != expected).any()
        assert not found
    thread.join()
    np.testing.assert_array_equal(found[0], expected)


def test_a_killed_calibration_goes_on(model: Model, own_packed: Callable[[str, str], Packed]) -> None:
    fit, seen = KINDS["gate"].fit, list[int]()

    def counted(packed: Packed, layer: Layer) -> dict[str, np.ndarray]:
        if seen == [0]:
            raise KeyboardInterrupt
        seen.append(layer.number)
        return fit(packed, layer)

    with mock.patch.dict(KINDS, gate=KINDS["gate"]._replace(fit=counted)):
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, method="gate", density=0.5, text=TEXT)
        assert store.about(model.packed) is None
        seen.clear()
        about = calibrate(model, method="gate", density=0.5, text=TEXT)
    assert seen == [1, 2]
    fresh = Model(own_packed("llama", "q4"), 1)
    other = calibrate(fresh, method="gate", density=0.5, text=TEXT)
    assert (about.densities, about.growth) == (other.densities, other.growth)


def test_two_at_a_time(model: Model) -> None:
    work = Calibration(model, TEXT)
    with pytest.raises(FewfireError, match="is being calibrated already"):
        calibrate(model, method="gate", density=0.5, text=TEXT)
    work.notebook.close()
    calibrate(model, method="gate", density=0.5, text=TEXT)
    with pytest.raises(ValueError, match="unknown method"):
        Calibration(model, TEXT).fit(["magic"])
    with mock.patch.object(choosing, "spread", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt) as _:
        calibrate(model, method="gate", density=0.5, text=TEXT)
    Calibration(model, TEXT)  # what was interrupted holds nothing, though its traceback is still there


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either a density or a budget"),
        ({"density": 0.5, "budget": 0.1, "method": "gate"}, "either a density or a budget"),
        ({"density": 1.5, "method": "gate"}, "density must be over 0"),
        ({"budget": 0.0}, "budget must be over 0"),
        ({"density": 0.5}, "needs a method"),
        ({"density": 0.5, "method": "magic"}, "unknown method"),
        ({"density": 0.5, "method": "gate", "text": "too short"}, "too few to calibrate"),
    ],
)
def test_impossible_options(model: Model, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calibrate(model, **options)


def test_all_methods_are_tried_that_can_keep_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each begins with the damage that the one before has ended with."""
    starts, work = dict[str, float](), mock.Mock(spec=Calibration)

    def within(work: Calibration, budget: float, method: str, start: float, stage: str) -> tuple[str, float] | None:
        starts[method] = start
        return (method, 2 * start) if method in keeping else None

    monkeypatch.setattr(choosing, "within", within)
    keeping = {"b", "c"}
    assert _within_budget(work, "abcd", 0.01) == ["b", "c"]
    assert [s / starts["a"] for s in starts.values()] == [1, 1, 2, 4]
    work.fit.assert_called_once_with("abcd")  # in one pass over the sample
    keeping = set()
    with pytest.raises(FewfireError, match="no setting of a, b keeps perplexity within 1 %"):
        _within_budget(work, "ab", 0.01)
