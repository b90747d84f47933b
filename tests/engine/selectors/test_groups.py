"""Groups are balanced and alike."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.selectors.groups import balanced, count


@pytest.mark.parametrize(("rows", "groups"), [(128, 4), (129, 5), (33, 2), (200, 7), (20, 1)])
def test_every_neuron_is_in_one_group(rows: int, groups: int, random: np.random.Generator) -> None:
    members = balanced(random.standard_normal((rows, 8), np.float32), groups)
    assert members.dtype == np.int32
    np.testing.assert_array_equal(np.sort(members), np.arange(rows))


def test_rows_that_point_the_same_way_are_together(random: np.random.Generator) -> None:
    centres = random.standard_normal((6, 32), np.float32)
    kinds = random.permutation(np.repeat(np.arange(6), 32))
    sizes = random.uniform(0.1, 10, (192, 1)).astype(np.float32)
    rows = sizes * (centres[kinds] + random.standard_normal((192, 32), np.float32) / 5)
    found = kinds[balanced(rows, 6)].reshape(6, 32)
    same = np.mean([np.bincount(group).max() for group in found]) / 32
    assert same > 0.7  # a bad start may leave two kinds in one group


def test_no_group_is_larger_than_it_may_be() -> None:
    assert [count(n) for n in (1, 32, 33, 1536)] == [1, 1, 2, 48]
    assert count(96, 8) == 12
