"""Calibrating tiny models from end to end: what is asked for is kept, and a killed one goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import tiny
from decoding import decoded
from fewfire import calibration, timing
from fewfire.calibrate import calibrate
from fewfire.calibration import Calibration
from fewfire.errors import FewfireError
from fewfire.model import Model
from fewfire.observe import Layer, Observation
from fewfire.packed import Packed, open_packed
from fewfire.progress import Progress
from fewfire.selectors import store
from fewfire.selectors.methods import KINDS, METHODS, Kind, parse, usual
from fewfire.selectors.selection import Selection

PackedPath = Callable[[str, str], Path]
TEXT = tiny.PARAGRAPH * 6


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_WINDOW", 64)
    monkeypatch.setattr(calibration, "_SCORED", 512)
    monkeypatch.setattr(calibration, "_PROBED", 64)


@pytest.fixture
def model(packed_path: PackedPath, tmp_path: Path) -> Model:
    """A model of the test's own."""
    return Model(open_packed(Path(shutil.copytree(packed_path("llama", "q4"), tmp_path / "packed"))), 1)


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


def test_exact_zeros_are_no_merit_of_a_calibration(packed_path: PackedPath, tmp_path: Path) -> None:
    """A selection must be faster than leaving out zeros, not only than dense."""
    model = Model(open_packed(Path(shutil.copytree(packed_path("opt", "q4"), tmp_path / "packed"))), 1)

    def no_faster(model: Model, selections: Sequence[Selection | None], *rest: object) -> list[float]:
        return [1.0] + [0.5] * (len(selections) - 1)

    with (
        mock.patch.object(timing, "side_by_side", no_faster),
        pytest.raises(FewfireError, match="faster than no calib"),
    ):
        calibrate(model, method="lowrank", budget=0.05, text=TEXT)


@pytest.mark.parametrize("tokens", [511, 520, 700, 1026, 1100])
def test_any_length_of_sample(model: Model, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(calibration, "_WINDOW", 256)
    text = model.tokenizer.decode(model.tokenizer.encode(tiny.PARAGRAPH * 20)[:tokens])
    count = len(model.tokenizer.encode(text))
    if count < 512:
        with pytest.raises(ValueError, match=f"{count} tokens, too few"):
            Calibration(model, text)
        return
    work = Calibration(model, text)
    assert len(work.fitted) >= 5
    assert sum(map(len, work.held)) > 0.1 * count
    assert min(len(window) for window in work.held + work.fitted) >= 32


def test_a_flat_head_has_nothing_to_screen(model: Model) -> None:
    flat = {name: np.array([value]) for name, value in
            {"densities": 1.0, "errors": 0.0, "missed": 0.0, "margins": np.inf}.items()}  # fmt: skip
    with mock.patch.dict(KINDS, screen=KINDS["screen"]._replace(fit=lambda *_: dict(flat))):
        work = Calibration(model, TEXT)
        assert work.costs("screen") == (0.0, 1.0)
        (choice,) = work.choices("screen", timed=True)
    assert list(choice.settings) == [{"screen": 1.0}]


def test_probes_of_a_model_that_is_sparse_by_itself_do_damage(packed_path: PackedPath, tmp_path: Path) -> None:
    """Leaving out what is zero anyway says nothing: probes leave out some of what fires."""
    model = Model(open_packed(Path(shutil.copytree(packed_path("opt", "q4"), tmp_path / "packed"))), 1)
    work = Calibration(model, TEXT)
    fits = work.fits("down")
    assert 0 < float(fits[0]["firing"]) < 0.95
    assert all(0 < weight < 1e4 for weight in work.weights("down"))


def test_a_budget_that_nothing_keeps(model: Model) -> None:
    with mock.patch.object(Calibration, "within", return_value=None), pytest.raises(FewfireError, match="allow more"):
        calibrate(model, method="gate", budget=0.01, text=TEXT)
    assert store.about(model.packed) is None


@pytest.mark.parametrize("before", ["calibrated", "exact"])
def test_a_failed_calibration_leaves_the_model_as_it_was(before: str, packed_path: PackedPath, tmp_path: Path) -> None:
    family = "llama-relu" if before == "exact" else "llama"
    model = Model(open_packed(Path(shutil.copytree(packed_path(family, "q4"), tmp_path / "packed"))), 1)
    if before == "calibrated":
        calibrate(model, method="gate", density=0.4, text=TEXT)
    expected, read = decoded(model), model.engine.neurons_read()
    assert (read < model.config.intermediate_size).any()
    failing = mock.patch.object(Calibration, "fastest", side_effect=KeyboardInterrupt)
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


def test_a_killed_calibration_goes_on(model: Model, packed_path: PackedPath, tmp_path: Path) -> None:
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
    fresh = Model(open_packed(Path(shutil.copytree(packed_path("llama", "q4"), tmp_path / "fresh"))), 1)
    other = calibrate(fresh, method="gate", density=0.5, text=TEXT)
    assert (about.densities, about.growth) == (other.densities, other.growth)


def test_what_another_engine_has_found_is_found_anew(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for revision, fitted in (("one", 3), ("one", 0), ("another", 3)):
        monkeypatch.setattr(calibration, "revision", lambda revision=revision: revision)
        work, fit = Calibration(model, TEXT), mock.Mock(side_effect=KINDS["gate"].fit)
        with mock.patch.dict(KINDS, gate=KINDS["gate"]._replace(fit=fit)):
            work.fits("gate")
        assert fit.call_count == fitted
        work.notebook.close()


def test_two_at_a_time(model: Model) -> None:
    work = Calibration(model, TEXT)
    with pytest.raises(FewfireError, match="is being calibrated already"):
        calibrate(model, method="gate", density=0.5, text=TEXT)
    work.notebook.close()
    calibrate(model, method="gate", density=0.5, text=TEXT)
    with pytest.raises(ValueError, match="unknown method"):
        Calibration(model, TEXT).fit(["magic"])
    with mock.patch.object(Calibration, "spread", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt) as _:
        calibrate(model, method="gate", density=0.5, text=TEXT)
    Calibration(model, TEXT)  # what was interrupted holds nothing, though its traceback is still there


def test_the_head_is_fitted_when_all_layers_were_seen(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(packed: Packed, sample: Observation) -> dict[str, np.ndarray]:
        return {"densities": np.array([0.5, 1.0]), "errors": np.array([0.1, 0.0]), "final": sample.final[0]}

    monkeypatch.setitem(KINDS, "screen", Kind("screen", "head", fit, lambda *_: None, None))
    monkeypatch.setitem(METHODS, "screen", ("screen",))
    work = Calibration(model, TEXT)
    work.fit(["gate+screen"])
    (found,) = work.fits("screen")
    assert found["final"].shape == (model.config.hidden_size,)
    assert work.weights("screen") == [1.0]
    assert len(work.fits("gate")) == len(work.fits("down")) == model.config.num_hidden_layers
    work.notebook.close()
    again = Calibration(model, TEXT)
    with mock.patch.object(calibration, "Observation", side_effect=AssertionError("all is in the notebook")):
        again.fit(["gate+screen"])


def test_baselines(model: Model) -> None:
    work, layers = Calibration(model, TEXT), model.config.num_hidden_layers
    uniform = work.uniform("gate")(0.5)
    assert uniform == {"gate": [0.5] * layers}
    adjusted = work.adjusted("gate", 0.6, work.uniform("gate"))
    trial = work.trial("gate", adjusted, 256, "measuring")
    assert len(set(adjusted["gate"])) == 1
    assert trial.density == pytest.approx(0.6, abs=0.02)
    greedy = work.greedy("gate+down")(0.5)
    assert set(greedy) == set(parse("gate+down").kinds)
    assert all(len(each) == layers for each in greedy.values())


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
