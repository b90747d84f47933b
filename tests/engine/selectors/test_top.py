"""The k largest: which neurons are kept, and what the others cost."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.selectors import top


def test_errors_are_those_of_the_smallest(random: np.random.Generator) -> None:
    tokens, neurons, hidden = 20, 30, 7
    gate = random.standard_normal((tokens, neurons)).astype(np.float32)
    fired = gate * random.standard_normal((tokens, neurons)).astype(np.float32)
    down = random.standard_normal((hidden, neurons)).astype(np.float32)
    energy = random.uniform(0.5, 2, tokens).astype(np.float32)
    densities = (0.1, 0.5, 0.9, 1.0)
    found = top.errors(gate, fired, down, energy, densities)
    for density, error in zip(densities, found, strict=True):
        dropped = np.argsort(np.abs(gate), axis=1)[:, : neurons - round(density * neurons)]
        lost = np.stack([down[:, d] @ h[d] for d, h in zip(dropped, fired, strict=True)])
        assert error == pytest.approx(float(((lost**2).sum(axis=1) / energy).mean()), rel=1e-4, abs=1e-12)
    assert found[-1] == 0


def test_counts() -> None:
    found = top.fill(1536, (1.0, 0.5, 0.0001))
    assert found.dtype == np.int32
    assert found.tolist() == [1536, 768, 1]
    with pytest.raises(ValueError, match="density"):
        top.count(10, 1.5)
