"""What is fitted to a sample, and that the notebook keeps it for the same engine alone."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest

import tiny
from fewfire import calibration, damage
from fewfire.calibration import Calibration
from fewfire.model import Model
from fewfire.observe import Observation
from fewfire.packed import Packed
from fewfire.probes import weights
from fewfire.selectors.methods import KINDS, METHODS, Kind

TEXT = tiny.PARAGRAPH * 6


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


def test_what_another_engine_has_found_is_found_anew(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for revision, fitted in (("one", 3), ("one", 0), ("another", 3)):
        monkeypatch.setattr(calibration, "revision", lambda revision=revision: revision)
        work, fit = Calibration(model, TEXT), mock.Mock(side_effect=KINDS["gate"].fit)
        with mock.patch.dict(KINDS, gate=KINDS["gate"]._replace(fit=fit)):
            work.fits("gate")
        assert fit.call_count == fitted
        work.notebook.close()


def test_the_head_is_fitted_when_all_layers_were_seen(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(packed: Packed, sample: Observation) -> dict[str, np.ndarray]:
        return {"densities": np.array([0.5, 1.0]), "errors": np.array([0.1, 0.0]), "final": sample.final[0]}

    monkeypatch.setitem(KINDS, "screen", Kind("screen", "head", fit, lambda *_: None, None))
    monkeypatch.setitem(METHODS, "screen", ("screen",))
    work = Calibration(model, TEXT)
    work.fit(["gate+screen"])
    (found,) = work.fits("screen")
    assert found["final"].shape == (model.config.hidden_size,)
    assert weights(work, "screen") == [1.0]
    assert len(work.fits("gate")) == len(work.fits("down")) == model.config.num_hidden_layers
    work.notebook.close()
    again = Calibration(model, TEXT)
    with mock.patch.object(calibration, "Observation", side_effect=AssertionError("all is in the notebook")):
        again.fit(["gate+screen"])


@pytest.mark.parametrize("family", ["llama", "llama-fatsilu", "llama-relu"])
def test_damage_is_measured_against_what_runs_uncalibrated(
    family: str, own_packed: Callable[[str, str], Packed]
) -> None:
    """With a ReLU's zeros left out: sums in another order are no damage."""
    packed = own_packed(family, "q4")
    work = Calibration(Model(packed, 2), TEXT)
    said = work.dense("said", work.held)
    down, c = work.model.engine.neurons_read()[:, 2].sum(), work.packed.config
    assert (down < c.num_hidden_layers * c.intermediate_size) == (family != "llama")
    work.model.engine.select(None)
    np.testing.assert_array_equal(damage.measure(work.model, work.held, said).grown, 0)
