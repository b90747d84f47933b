"""Fixtures that several test files share.

Tests run with a cache of their own, so that none sees what the user has or leaves something there. Two things
are shared with the user's cache, because they are slow to get and named by a checksum: compiled kernels, and
the download of the real default model.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from fewfire.cache import cache_dir

USER_CACHE = cache_dir()
_SESSION_CACHE = Path(tempfile.mkdtemp(prefix="fewfire-tests-"))
# At import, because the kernels choose their cache directory when they are imported, during collection.
os.environ["FEWFIRE_CACHE"] = str(_SESSION_CACHE)
os.environ["HF_HUB_OFFLINE"] = "1"


def _share_kernels(cache: Path) -> None:
    with contextlib.suppress(OSError):  # a home that cannot be written: the session compiles for itself
        (USER_CACHE / "kernels").mkdir(parents=True, exist_ok=True)
        (cache / "kernels").symlink_to(USER_CACHE / "kernels", target_is_directory=True)


def pytest_configure() -> None:
    _share_kernels(_SESSION_CACHE)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored for what runs behind it


def pytest_unconfigure() -> None:
    shutil.rmtree(_SESSION_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_path("qwen3")`: a tiny random model of a family on disk, made once a session."""
    made: dict[str, Path] = {}

    def path(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tiny.write_tiny(family, tmp_path_factory.mktemp("tiny") / family)
        return made[family]

    return path


@pytest.fixture(scope="session")
def fetched() -> Callable[[str], Path]:
    """`fetched("smollm2")`: the real model of an alias; fetched once and then kept in the user's cache."""
    from fewfire.sources import resolve

    def path(alias: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEWFIRE_CACHE", str(USER_CACHE))
            return resolve(alias)

    return path


@pytest.fixture(scope="session")
def smollm2_path(fetched: Callable[[str], Path]) -> Path:
    """The real default model's file."""
    return fetched("smollm2")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory for one test, empty but for the compiled kernels."""
    cache = tmp_path / "cache"
    cache.mkdir()
    _share_kernels(cache)
    monkeypatch.setenv("FEWFIRE_CACHE", str(cache))
    return cache
