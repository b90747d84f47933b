"""What an error means to the predictions, in models that leave something out by themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import tiny
from fewfire.calibration import Calibration
from fewfire.model import Model
from fewfire.packed import Packed
from fewfire.probes import weights


@pytest.mark.usefixtures("quick")
def test_probes_of_a_model_that_is_sparse_by_itself_do_damage(own_packed: Callable[[str, str], Packed]) -> None:
    """Leaving out what is zero anyway says nothing: probes leave out some of what fires."""
    model = Model(own_packed("opt", "q4"), 1)
    work = Calibration(model, tiny.PARAGRAPH * 6)
    fits = work.fits("down")
    assert 0 < float(fits[0]["firing"]) < 0.95
    assert all(0 < weight < 1e4 for weight in weights(work, "down"))
