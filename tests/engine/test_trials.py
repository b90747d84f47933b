"""Trying settings: what the kernels read is what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

import tiny
from fewfire import choosing, memory, timing
from fewfire.calibration import Calibration
from fewfire.model import Model
from fewfire.packed import Packed
from fewfire.selectors.choices import governed_bytes
from fewfire.selectors.parts import flatten
from fewfire.selectors.selection import Selection
from fewfire.trials import Trial, adjusted, density, fastest, trial


def test_a_share_is_adjusted_until_the_kernels_read_it(model: Model) -> None:
    work = Calibration(model, tiny.PARAGRAPH * 6)
    densities = adjusted(work, "gate", 0.6, choosing.uniform(work, "gate"))
    found = trial(work, "gate", densities, 256, "measuring")
    assert len(set(densities["gate"])) == 1
    assert found.density == pytest.approx(0.6, abs=0.02)


def test_a_bound_is_of_growth_with_its_error_and_of_the_harder_texts_divergence() -> None:
    measured = {"growth": 0.01, "growth_error": 0.002, "kl": 0.005}
    assert Trial("gate", {}, 0.5, measured, worse_kl=0.006).bound == pytest.approx(0.01 + 1.28 * 0.002)
    assert Trial("gate", {}, 0.5, measured, worse_kl=0.03).bound == pytest.approx(math.expm1(0.03))


def test_zeros_of_a_relu_are_no_share_of_the_head(own_packed: Callable[[str, str], Packed]) -> None:
    """But of the neurons, which other methods choose from."""
    packed = own_packed("llama-relu", "q4")
    work = Calibration(Model(packed, 2), tiny.PARAGRAPH * 6)
    head, whole = governed_bytes(work.packed, ["screen"]), work.packed.bytes_per_token()
    read = work.dense("said", work.held).read.mean()
    assert read < whole
    assert density(work, "screen", read - head / 2, read) == pytest.approx(0.5)
    neurons = governed_bytes(work.packed, ["screen", "gate"])
    assert density(work, "gate+screen", read - head / 2, read) == pytest.approx(1 - (whole - read + head / 2) / neurons)


def test_settings_are_timed_as_they_will_be_loaded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In large pages, of which a tiny screen would not fill one."""
    work, places = Calibration(model, tiny.PARAGRAPH * 6), list[int]()
    monkeypatch.setattr(memory, "_large_page", lambda: 4096)

    def timed(model: Model, selections: Sequence[Selection | None], *_: object) -> list[float]:
        assert selections[2]
        places.extend(array.ctypes.data for array in flatten(selections[2])[0].values())
        return [1.0, 1.0, 0.5]

    monkeypatch.setattr(timing, "side_by_side", timed)
    densities = {"screen": [float(work.fits("screen")[0]["densities"][0])]}
    assert fastest(work, [Trial("screen", densities, 0.5, {}, 0.0)]) == (0, 2.0, 2.0)
    assert min(places) % 4096 == 0
    assert not any(place % 64 for place in places)
