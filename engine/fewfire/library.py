"""What fewfire keeps in its cache: fetched models and packed ones, their sizes, and removing them.

Promises: removing one renames it first, so that a half removed model never counts as present. Tolerates
damaged entries: they are listed as such and can be removed. The hub's own cache is not touched.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fewfire.cache import cache_dir
from fewfire.errors import SourceError
from fewfire.packed import DESCRIPTION
from fewfire.sources import ALIASES
from fewfire.wheels import is_complete, sources_dir


@dataclass(frozen=True)
class Cached:
    """One entry of the cache."""

    name: str  # what `remove` takes: "smollm2" for a download, "smollm2:q4" for a packed model
    kind: Literal["source", "packed"]
    path: Path
    bytes: int
    damaged: bool = False


def packed_dir() -> Path:
    """Where packed models are kept, one directory each. Not created here."""
    return cache_dir() / "packed"


def cached_sources() -> list[Cached]:
    """Everything in the cache: downloads first, each kind by name."""
    entries = [_source(path) for path in _children(sources_dir())]
    entries += [_packed(path) for path in _children(packed_dir())]
    return sorted(entries, key=lambda entry: (entry.kind == "packed", entry.name, entry.path))


def remove(name: str) -> list[Cached]:
    """Remove a model by its name ("smollm2" takes its packed forms along) or its directory's name.

    Returns what was removed. Raises `ValueError` when there is nothing of that name.
    """
    entries = cached_sources()
    doomed = [e for e in entries if name in (e.name, e.name.partition(":")[0], e.path.name)]
    if not doomed:
        names = ", ".join(dict.fromkeys(entry.name for entry in entries)) or "nothing"
        raise ValueError(f"no model {name!r} in the cache; it has: {names}")
    for entry in doomed:
        try:
            _delete(entry.path)
        except OSError as error:
            raise SourceError(
                f"cannot remove {entry.path}: {error.strerror or error}; close the programs that use it, "
                "and check its permissions"
            ) from error
    return doomed


def _children(directory: Path) -> list[Path]:
    try:
        # What is hidden is work in progress.
        return [path for path in directory.iterdir() if not path.name.startswith(".")]
    except OSError:
        return []


def _source(path: Path) -> Cached:
    model = ALIASES.get(path.name)
    damaged = model is None or not is_complete(path / model.file, model)
    return Cached(path.name, "source", path, _size(path), damaged)


def _packed(path: Path) -> Cached:
    try:
        about = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        name, weights = about.get("name", path.name), about.get("weights", "")
        if isinstance(name, str) and isinstance(weights, str):
            return Cached(f"{name}:{weights}" if weights else name, "packed", path, _size(path))
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    return Cached(path.name, "packed", path, _size(path), damaged=True)


def _size(path: Path) -> int:
    """Bytes of a file or of everything in a directory; links count as nothing."""
    if path.is_symlink():
        return 0
    if path.is_file():
        return path.stat().st_size
    total = 0
    for directory, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(directory, name)).st_size
            except OSError:
                continue  # removed meanwhile
    return total


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    hidden = path.with_name(f".removed-{os.getpid()}-{path.name}")
    os.replace(path, hidden)
    shutil.rmtree(hidden)
