"""Typed values out of a checkpoint's configuration, with errors that name the field.

Promises that what it returns has the asked type and lies in the asked range, and that anything else is a
one-line `CheckpointError`. Knows nothing of models; `families.py` and `gguf.py` say which fields to read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fewfire.errors import CheckpointError

_REQUIRED: Any = object()


class Fields:
    """A read-only view of a configuration; `where` is the file, and begins every error."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null: configurations write null for "not set"."""
        return self.data.get(name) is not None

    def error(self, name: str, expected: str) -> CheckpointError:
        """The error for a field that is missing or not as expected."""
        if name not in self:
            return CheckpointError(f"{self.where}: {name} is missing, expected {expected}")
        return CheckpointError(f"{self.where}: {name} is {_short(self.data[name])}, expected {expected}")

    def whole(self, name: str, low: int, high: int, default: Any = _REQUIRED) -> Any:
        """A whole number from low to high; `default` when the field is missing or null."""
        value = self.data.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: Any = _REQUIRED) -> float:
        """A finite number from low to high."""
        value = self.data.get(name)
        if value is None and default is not _REQUIRED:
            return float(default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(name, f"a number from {low:g} to {high:g}")
        if not low <= value <= high:
            raise self.error(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A string."""
        value = self.data.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def section(self, name: str) -> Fields | None:
        """A nested object, None where it is missing or null."""
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, "an object")
        return Fields(value, f"{self.where}: {name}")

    def items(self, name: str, length: int) -> list[Any] | None:
        """A list of exactly this length, None where it is missing or null."""
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != length:
            raise self.error(name, f"a list of {length} entries")
        return list(value)

    def ids(self, name: str, limit: int) -> tuple[int, ...]:
        """Token ids: one, a list of them, or none. Each below `limit`."""
        value = self.data.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for token in values:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < limit:
                raise self.error(name, f"token ids from 0 to {limit - 1}")
        return tuple(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)


def unique(ids: Sequence[int]) -> tuple[int, ...]:
    """The same ids in the same order, each once."""
    return tuple(dict.fromkeys(ids))


def _short(value: Any) -> str:
    """A value for an error message: one line, of bounded length."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return f"a list of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
