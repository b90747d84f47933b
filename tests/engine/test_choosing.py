"""Ways to choose densities: each gives one for every layer of every kind."""

from __future__ import annotations

from unittest import mock

import numpy as np

import tiny
from fewfire import choosing
from fewfire.calibration import Calibration
from fewfire.model import Model
from fewfire.selectors.methods import KINDS, parse


def test_baselines(model: Model) -> None:
    work, layers = Calibration(model, tiny.PARAGRAPH * 6), model.config.num_hidden_layers
    uniform = choosing.uniform(work, "gate")(0.5)
    assert uniform == {"gate": [0.5] * layers}
    greedy = choosing.greedy(work, "gate+down")(0.5)
    assert set(greedy) == set(parse("gate+down").kinds)
    assert all(len(each) == layers for each in greedy.values())


def test_a_flat_head_has_nothing_to_screen(model: Model) -> None:
    flat = {name: np.array([value]) for name, value in
            {"densities": 1.0, "errors": 0.0, "missed": 0.0, "margins": np.inf}.items()}  # fmt: skip
    kind = KINDS["screen"]._replace(fit=lambda *_: dict(flat), fill=lambda *_: mock.Mock())
    with mock.patch.dict(KINDS, screen=kind):
        work = Calibration(model, tiny.PARAGRAPH * 6)
        (choice,) = choosing.options(work, "screen")
    assert list(choice.settings) == [{"screen": 1.0}]
