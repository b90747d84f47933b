"""Norms, activations, RoPE and the quantising of vectors against their twins in `perf/kernel_table.py`."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.buffers import Activation
from fewfire.config import ACTIVATIONS, THRESHOLDED
from fewfire.kernels import pointwise
from perf.kernel_table import TABLE

COLUMNS = (1, 6, 8, 31, 40, 64, 100, 320, 576, 1536)


def test_activations_are_numbered_as_the_config_names_them() -> None:
    numbers = pointwise.SILU, pointwise.GELU_TANH, pointwise.RELU, pointwise.RELU2
    names = "silu", "gelu_tanh", "relu", "relu2"
    assert [ACTIVATIONS[n] for n in numbers] == list(names)
    assert set(THRESHOLDED) == set(ACTIVATIONS) - set(names)


@pytest.mark.parametrize("kind", range(4), ids=ACTIVATIONS[:4])
def test_activate(kind: int, random: np.random.Generator) -> None:
    for count in (0, 1, 7, 8, 9, 64, 1000):
        TABLE["activate"](random, kind=kind, count=count).check()
        for row in {16, count} - {0}:
            for centred in (False, True):
                TABLE["activate"](random, kind=kind, count=count, row=row, centred=centred).check()


@pytest.mark.parametrize("columns", COLUMNS)
def test_norms(columns: int, random: np.random.Generator) -> None:
    TABLE["rms_norm"](random, columns=columns).check()
    TABLE["rms_norm"](random, columns=columns, in_place=True, eps=1e-6).check()
    TABLE["layer_norm"](random, columns=columns + 1).check()


@pytest.mark.parametrize("half", [1, 3, 4, 8, 20, 32, 64])
def test_rotate(half: int, random: np.random.Generator) -> None:
    TABLE["rotate"](random, half=half).check()


@pytest.mark.parametrize("weights", ["q8", "q4"])
@pytest.mark.parametrize("columns", [1, 40, 64, 100, 192, 256, 320, 448, 576, 1536])
def test_quantize(columns: int, weights: str, random: np.random.Generator) -> None:
    """Integer for integer, one vector of several, the others untouched."""
    TABLE[f"quantize_{weights}"](random, columns=columns).check()
    for vector in (0, 2, 4):
        TABLE[f"quantize_{weights}"](random, columns=columns, tokens=5, vector=vector).check()


def test_quantize_at_the_edges(random: np.random.Generator) -> None:
    """Zeros and the tiniest numbers become zero, not NaN; ties go to even."""
    x = Activation(128)
    x.values[0, 32:64] = 1e-39 * random.standard_normal(32)
    x.values[0, 64:96] = np.arange(32) + 0.5
    x.values[0, 95] = 127
    pointwise.quantize_q4(x.descriptor.ctypes.data, 0)
    assert np.isfinite(x.scales).all()
    assert (x.scales >= 0).all()
    scales, quants = x.scales[0, ::2], x.quants("q4")[0].reshape(4, 8, 4).transpose(1, 0, 2).reshape(4, 32)
    assert (quants[[0, 3]] == 0).all()
    assert np.abs(quants[1] * scales[1] - x.values[0, 32:64]).max() < 1e-38
    np.testing.assert_array_equal(quants[2], np.rint(x.values[0, 64:96]))
