"""Groups are balanced and alike, and routers keep the share of them that they should."""

from __future__ import annotations

import numpy as np
import pytest

import planted
from fewfire.selectors import Selection, router
from fewfire.selectors.parts import flatten, misfit
from fewfire.selectors.predicted import predicted
from fewfire.selectors.scores import held_out


@pytest.mark.parametrize(("rows", "groups"), [(128, 4), (129, 5), (33, 2), (200, 7), (20, 1)])
def test_every_neuron_is_in_one_group(rows: int, groups: int, random: np.random.Generator) -> None:
    members = router.balanced(random.standard_normal((rows, 8), np.float32), groups)
    assert members.dtype == np.int32
    np.testing.assert_array_equal(np.sort(members), np.arange(rows))


def test_rows_that_point_the_same_way_are_together(random: np.random.Generator) -> None:
    centres = random.standard_normal((6, 32), np.float32)
    kinds = random.permutation(np.repeat(np.arange(6), 32))
    sizes = random.uniform(0.1, 10, (192, 1)).astype(np.float32)
    rows = sizes * (centres[kinds] + random.standard_normal((192, 32), np.float32) / 5)
    found = kinds[router.balanced(rows, 6)].reshape(6, 32)
    same = np.mean([np.bincount(group).max() for group in found]) / 32
    assert same > 0.7  # a bad start may leave two kinds in one group


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
