"""What the predictors that are compared are, on a layer that is made up."""

from unittest import mock

import numpy as np
import pytest

import planted
from fewfire.selectors import lowrank
from perf import predictors


@pytest.fixture
def layer():
    return planted.layer(np.random.default_rng(0), tokens=1024)


def test_the_guess_is_not_refined(layer):
    packed, contenders = planted.packed(), predictors.contenders(planted.HIDDEN, 1024, [64])
    refined = lowrank.fit(packed, layer)
    np.testing.assert_array_equal(contenders["rank 64"](packed, layer)["rows"], refined["rows"])
    with mock.patch.object(lowrank, "refined", side_effect=AssertionError):
        guess = contenders["rank 64, guess"](packed, layer)
        with pytest.raises(AssertionError):
            contenders["rank 64"](packed, layer)
    assert guess["errors"][5] > refined["errors"][5]


def test_the_table(layer):
    rows = predictors.compare(planted.packed("q8"), layer, [64], list(predictors.DENSITIES))
    lines = predictors.predictor_table({"rows": rows, "densities": predictors.DENSITIES}).splitlines()[2:]
    lost = {line.split("|")[1].strip(): float(line.split("|")[3].split(",")[0]) for line in lines}
    assert list(lost)[:2] == ["exact", "gate"]
    assert list(lost)[-1] == "router"
    assert lost["exact"] < lost["gate"] < lost["rank 64"] < lost["rank 64, guess"]
    assert lost["rank 64"] < lost["rank 64, early"]  # what it sees is blurred
