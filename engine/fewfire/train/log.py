"""The log of a run: JSON objects, one a line, of steps ("loss", ...) and of measurements ("perplexity", ...)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = "log.jsonl"
Entries = Sequence[Mapping[str, Any]]


def append(path: Path, entry: Mapping[str, Any]) -> int:
    """Adds an entry; returns how many bytes the file has then."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        return file.tell()


def read(path: Path) -> list[dict[str, Any]]:
    """All entries, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def steps(entries: Entries) -> list[Mapping[str, Any]]:
    """Those of steps."""
    return [entry for entry in entries if "loss" in entry]


def measurements(entries: Entries) -> list[Mapping[str, Any]]:
    """Those of measurements; the first has the original's perplexity as well."""
    return [entry for entry in entries if "perplexity" in entry]
