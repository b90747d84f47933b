"""Ways to choose densities: each gives one for every layer of every kind."""

from __future__ import annotations

import tiny
from fewfire import choosing
from fewfire.calibration import Calibration
from fewfire.model import Model
from fewfire.selectors.methods import parse


def test_baselines(model: Model) -> None:
    work, layers = Calibration(model, tiny.PARAGRAPH * 6), model.config.num_hidden_layers
    uniform = choosing.uniform(work, "gate")(0.5)
    assert uniform == {"gate": [0.5] * layers}
    greedy = choosing.greedy(work, "gate+down")(0.5)
    assert set(greedy) == set(parse("gate+down").kinds)
    assert all(len(each) == layers for each in greedy.values())
