"""What is timed, and what is not because there is nothing to choose from."""

from __future__ import annotations

from unittest import mock

import numpy as np

import tiny
from fewfire.calibration import Calibration
from fewfire.choosing import options
from fewfire.costs import costs
from fewfire.model import Model
from fewfire.selectors.choices import Cost
from fewfire.selectors.methods import KINDS


def test_a_flat_head_has_nothing_to_screen(model: Model) -> None:
    flat = {name: np.array([value]) for name, value in
            {"densities": 1.0, "errors": 0.0, "missed": 0.0, "margins": np.inf}.items()}  # fmt: skip
    with mock.patch.dict(KINDS, screen=KINDS["screen"]._replace(fit=lambda *_: dict(flat))):
        work = Calibration(model, tiny.PARAGRAPH * 6)
        assert costs(work, "screen") == Cost(0.0)
        (choice,) = options(work, "screen", timed=True)
    assert list(choice.settings) == [{"screen": 1.0}]
