"""Networks of tiny models, and one that has learned to predict a text; all of it only where torch is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tiny
from fewfire.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from fewfire.train.network import Network
    from learning import Learned

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]


@pytest.fixture(scope="session")
def checkpoint(tiny_path: Callable[[str], Path]) -> Callable[[str], Checkpoint]:
    """`checkpoint("qwen3")`: the tiny model of a family, opened."""
    return lambda family="llama": open_checkpoint(tiny_path(family))


@pytest.fixture
def network(checkpoint: Callable[[str], Checkpoint]) -> Callable[[str], Network]:
    """`network("qwen3")`: a new network of a tiny model."""
    from fewfire.train.network import Network

    return lambda family="llama": Network.from_checkpoint(checkpoint(family))


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """A tiny SiLU model, trained from scratch until it predicts a text."""
    from learning import learn

    return learn(tiny.write_tiny("llama", tmp_path_factory.mktemp("scratch") / "model"), tmp_path_factory.mktemp("run"))
