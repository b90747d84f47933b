"""Packed tiny models, fresh random inputs, and transformers to compare with, for the tests of the engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewfire.pack import pack

PackedPath = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def packed_path(tiny_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> PackedPath:
    """`packed_path("qwen3", "q8")`: the tiny model of a family in a format, packed once a session."""
    directory = tmp_path_factory.mktemp("packed")

    def path(family: str, weights: str) -> Path:
        out = directory / f"{family}-{weights}"
        return out if out.exists() else pack(tiny_path(family), out, weights)

    return path


@pytest.fixture(scope="session")
def peers() -> Any:
    """The module, on demand because importing torch takes seconds; a skip where it is not installed."""
    pytest.importorskip("transformers", reason="needs the `peers` extra")
    import peers

    return peers


@pytest.fixture
def random() -> np.random.Generator:
    """A generator with another seed each time, or with that of FEWFIRE_TEST_SEED."""
    seed = int(os.environ.get("FEWFIRE_TEST_SEED") or np.random.SeedSequence().generate_state(1)[0])
    print(f"to repeat: FEWFIRE_TEST_SEED={seed}")
    return np.random.default_rng(seed)
