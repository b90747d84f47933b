"""What errors are divided by is the energy of the stream that they end up in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fewfire import reference
from fewfire.observe import Observation
from fewfire.packed import open_packed
from fewfire.reference import ReferenceCache
from fewfire.selectors.fits import ffn_energy
from tiny import prompt
from unpack import tensors


@pytest.mark.parametrize("family", ["llama-bias", "opt", "llama-centred"])
def test_the_energy_is_that_of_the_stream_after_the_ffn(family: str, packed_path: Callable[[str, str], Path]) -> None:
    """All of what the FFN puts out: biases and bypasses as well."""
    packed, ids = open_packed(packed_path(family, "f32")), np.array(prompt(20))
    weights, positions = tensors(packed), np.arange(len(ids))
    x = reference.embedded(packed.config, weights, ids, positions)
    for layer in Observation(packed, [ids.tolist()]):
        x = reference.block(packed.config, weights, layer.number, x, positions, ReferenceCache()).out
        np.testing.assert_allclose(ffn_energy(packed, layer), np.square(x).sum(axis=1), rtol=1e-4)
