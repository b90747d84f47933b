"""Packed tiny models, fresh random inputs, and transformers to compare with, for the tests of the engine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewfire import calibration, probes, trials
from fewfire.model import Model
from fewfire.pack import pack
from fewfire.packed import Packed, open_packed
from tiny import write_tiny

PackedPath = Callable[[str, str], Path]


def _packed_once(source: Path, out: Path, weights: str) -> Path:
    return out if out.exists() else pack(source, out, weights)


@pytest.fixture(scope="session")
def packed_path(tiny_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> PackedPath:
    """`packed_path("qwen3", "q8")`: the tiny model of a family in a format, packed once a session."""
    directory = tmp_path_factory.mktemp("packed")

    def path(family: str, weights: str) -> Path:
        return _packed_once(tiny_path(family), directory / f"{family}-{weights}", weights)

    return path


@pytest.fixture(scope="session")
def shaped_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`shaped_path("q8", hidden_size=256)`: a tiny llama of another shape in a format, packed once a session."""
    directory = tmp_path_factory.mktemp("shaped")

    def path(weights: str, **shape: int) -> Path:
        name = "-".join(f"{key}{value}" for key, value in sorted(shape.items()))
        source = directory / name
        if not source.exists():
            write_tiny("llama", source, **shape)
        return _packed_once(source, directory / f"{name}-{weights}", weights)

    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrations in small windows, and of few tokens."""
    monkeypatch.setattr(calibration, "_WINDOW", 64)
    monkeypatch.setattr(trials, "_SCORED", 512)
    monkeypatch.setattr(probes, "_PROBED", 64)


@pytest.fixture
def own_packed(packed_path: PackedPath, tmp_path: Path) -> Callable[[str, str], Packed]:
    """`own_packed("opt", "q4")`: the same, opened, a copy of the test's own, to be calibrated or damaged."""

    def own(family: str, weights: str) -> Packed:
        copy = tempfile.mkdtemp(prefix="packed-", dir=tmp_path)
        return open_packed(Path(shutil.copytree(packed_path(family, weights), copy, dirs_exist_ok=True)))

    return own


@pytest.fixture
def model(own_packed: Callable[[str, str], Packed], quick: None) -> Model:
    """A tiny model of the test's own, to be calibrated."""
    return Model(own_packed("llama", "q4"), 1)


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
