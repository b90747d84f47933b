"""Routers keep the share of groups that they should."""

from __future__ import annotations

import numpy as np
import pytest

import planted
from fewfire.selectors import Selection, router
from fewfire.selectors.parts import flatten, misfit
from fewfire.selectors.predicted import predicted
from fewfire.selectors.scores import held_out


@pytest.mark.parametrize("weights", ["f32", "q4"])
@pytest.mark.parametrize("neurons", [160, 200])
def test_the_wanted_share_is_kept(weights: str, neurons: int, random: np.random.Generator) -> None:
    packed, layer = planted.packed(weights, neurons=neurons), planted.layer(random, neurons=neurons)
    fit, held = router.fit(packed, layer), held_out(len(layer.fired))
    for density in (0.1, 0.5, 0.9):
        predictor = router.fill(packed, [fit], [density])
        assert predicted(predictor, packed.formats, layer)[held].mean() == pytest.approx(
            density,
            abs=0.03 if density in fit["densities"] else 0.05,  # cuts between measured ones are interpolated
        )
        assert not misfit(packed, *flatten(Selection("router", predictor=predictor)))
    assert predicted(router.fill(packed, [fit], [1.0]), packed.formats, layer).all()
    assert (np.diff(fit["errors"]) <= 0).all()
    assert fit["errors"][-1] == 0


def test_groups_that_fire_together_are_found(random: np.random.Generator) -> None:
    """Gates of four kinds of neurons: what a group does is then known from a few functions of the input."""
    packed, layer = planted.packed("q8"), planted.layer(random, rank=1)
    fit = router.fit(packed, layer)
    assert np.interp(0.5, fit["densities"], fit["errors"]) < 0.3 * fit["errors"][0]
