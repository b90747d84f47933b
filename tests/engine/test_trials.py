"""Trying settings: what the kernels read is what was asked for."""

from __future__ import annotations

import pytest

import tiny
from fewfire import choosing
from fewfire.calibration import Calibration
from fewfire.model import Model
from fewfire.trials import adjusted, trial


def test_a_share_is_adjusted_until_the_kernels_read_it(model: Model) -> None:
    work = Calibration(model, tiny.PARAGRAPH * 6)
    densities = adjusted(work, "gate", 0.6, choosing.uniform(work, "gate"))
    found = trial(work, "gate", densities, 256, "measuring")
    assert len(set(densities["gate"])) == 1
    assert found.density == pytest.approx(0.6, abs=0.02)
