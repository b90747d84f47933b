"""Which neurons a predictor keeps, by hand."""

from __future__ import annotations

import numpy as np

import planted
from fewfire.packed import Formats
from fewfire.quantize import encode
from fewfire.selectors import Predictor
from fewfire.selectors.predicted import predicted

F32 = Formats("f32", "f32", "f32")


def test_groups_with_and_without_a_basis(random: np.random.Generator) -> None:
    layer = planted.layer(random, tokens=20)
    rows = random.standard_normal((3, planted.HIDDEN), np.float32)
    bias = np.array([0.5, -0.5, np.inf], np.float32)
    members = random.permutation(planted.NEURONS).astype(np.int32)  # groups of 67, 67 and 66
    whole = Predictor(encode(rows, "f32", "dot")[None], bias[None], members[None])
    kept = layer.ffn_in @ rows.T + bias > 0
    mask = predicted(whole, F32, layer)
    for group, neurons in enumerate((members[:67], members[67:134], members[134:])):
        np.testing.assert_array_equal(mask[:, neurons], np.repeat(kept[:, group : group + 1], len(neurons), axis=1))
    small = random.standard_normal((3, 2), np.float32)
    basis = random.standard_normal((2, planted.HIDDEN), np.float32)
    parts = encode(small, "f32", "dot")[None], bias[None], members[None], encode(basis, "f32", "dot")[None]
    kept = layer.ffn_in @ basis.T @ small.T + bias > 0
    np.testing.assert_array_equal(predicted(Predictor(*parts), F32, layer)[:, members[0]], kept[:, 0])
