"""What a long computation has found so far, on disk, so that a killed one goes on where it stopped.

A notebook belongs to a key, which says all that its entries depend on; one with another key is another notebook.
Entries are whole or not there. Knows nothing of what it keeps.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_PREFIX = ".calibrating-"
_STALE = 7 * 24 * 3600  # seconds after which nobody comes back for a notebook


class Notebook:
    """Entries under names, in a directory of their own inside `parent`, which must be writable."""

    def __init__(self, parent: Path, key: object) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self._path = parent / f"{_PREFIX}{digest}"
        self._path.mkdir(exist_ok=True)
        self._numbers: dict[str, Any] = {}
        with contextlib.suppress(OSError), (self._path / "numbers.jsonl").open(encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError):  # the last line of a killed run
                    self._numbers.update(json.loads(line))

    def number(self, name: str, compute: Callable[[], Any]) -> Any:
        """The entry of that name, anything that JSON can hold; computed unless it is there."""
        if name not in self._numbers:
            value = compute()
            with (self._path / "numbers.jsonl").open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({name: value}) + "\n")  # not on the line that a killed run began
            self._numbers[name] = value
        return self._numbers[name]

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays kept under that name, None if there are none."""
        try:
            with np.load(self._file(name)) as file:
                return {key: file[key] for key in file.files}
        except (OSError, ValueError):
            return None

    def keep(self, name: str, **arrays: np.ndarray) -> None:
        """Keeps arrays under a name."""
        temporary = self._path / f".{os.getpid()}.npz"
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, self._file(name))

    def _file(self, name: str) -> Path:
        return self._path / f"{name}.npz"

    def remove(self) -> None:
        """Removes this notebook, and others that were given up long ago."""
        shutil.rmtree(self._path, ignore_errors=True)
        for path in self._path.parent.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                if time.time() - max(p.stat().st_mtime for p in (path, *path.iterdir())) > _STALE:
                    shutil.rmtree(path, ignore_errors=True)
