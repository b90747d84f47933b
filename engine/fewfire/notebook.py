"""What a long computation has found so far, on disk, so that a killed one goes on where it stopped.

A notebook belongs to a key, which says all that its entries depend on; one with another key is another notebook. Only
one in a directory is open at a time. Entries are whole or not there. Knows nothing of what it keeps.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock, Timeout

from fewfire.errors import FewfireError

_PREFIX = ".calibrating-"
_LOCK = ".calibrate.lock"  # stays: whoever removed it might have taken it from somebody who has just opened it
_STALE = 7 * 24 * 3600  # seconds after which nobody comes back for a notebook


class Notebook:
    """Entries under names, in a directory of their own inside `parent`. Open until `close`, `remove`, or garbage.

    Everything raises `FewfireError` where `parent` cannot be written, and so does opening one while another is open,
    in this process or another.
    """

    def __init__(self, parent: Path, key: object) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self._path = parent / f"{_PREFIX}{digest}"
        self._lock = FileLock(parent / _LOCK)
        with self._written():
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise FewfireError(
                    f"{parent} is being calibrated already: wait until that is done, or stop it, and start again"
                ) from None
            _sweep(parent)
            self._path.mkdir(exist_ok=True)
        self._numbers: dict[str, Any] = {}
        with (
            contextlib.suppress(OSError),
            (self._path / "numbers.jsonl").open(encoding="utf-8", errors="replace") as file,
        ):
            for line in file:
                with contextlib.suppress(ValueError):  # the last line of a killed run
                    self._numbers.update(json.loads(line))

    def number(self, name: str, compute: Callable[[], Any]) -> Any:
        """The entry of that name, anything that JSON can hold; computed unless it is there."""
        if name not in self._numbers:
            value = compute()
            with self._written(), (self._path / "numbers.jsonl").open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({name: value}) + "\n")  # not on the line that a killed run began
            self._numbers[name] = value
        return self._numbers[name]

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays kept under that name, None if there are none."""
        try:
            with np.load(self._file(name)) as file:
                return {key: file[key] for key in file.files}
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, BadZipFile):  # whatever a damaged file causes
            return None

    def keep(self, name: str, **arrays: np.ndarray) -> None:
        """Keeps arrays under a name."""
        temporary = self._path / f".{os.getpid()}.npz"
        with self._written():
            with temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                with contextlib.suppress(OSError):  # some file systems cannot
                    os.fsync(file.fileno())  # or a crash of the machine may leave the name without the contents
            os.replace(temporary, self._file(name))

    def close(self) -> None:
        """Lets others open theirs; the entries stay."""
        self._lock.release()

    def remove(self) -> None:
        """Removes all entries, and closes it."""
        shutil.rmtree(self._path, ignore_errors=True)
        self.close()

    def _file(self, name: str) -> Path:
        return self._path / f"{name}.npz"

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Says what to do where the disk does not take it."""
        try:
            yield
        except OSError as error:
            raise FewfireError(
                f"cannot write to {self._path.parent} ({error.strerror or error}): make room and start again, which "
                "goes on from here, or copy the packed model to where you may write"
            ) from None


def _sweep(parent: Path) -> None:
    """Removes notebooks that were given up long ago."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - max(p.stat().st_mtime for p in (path, *path.iterdir())) > _STALE:
                shutil.rmtree(path, ignore_errors=True)
