"""Where measurements are kept: one small JSON file each in perf/results, which are committed."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

BUSY = 0.03  # share of the machine that others may use before timings are doubtful
RESULTS = Path(__file__).parent / "results"


def write(name: str, kind: str, content: dict[str, Any]) -> Path:
    """Keeps a measurement under a name, in place of an earlier one of that name."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path, temporary = RESULTS / f"{name}.json", RESULTS / f".{name}.{os.getpid()}"
    now = datetime.now(timezone.utc).date().isoformat()
    try:
        text = json.dumps({"kind": kind, "date": now} | content, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def finish(name: str, kind: str, content: dict[str, Any]) -> None:
    """Keeps a measurement unless its name is "-", and says so; warns if the machine was busy with other things."""
    if name != "-":
        print(f"\nwritten: perf/results/{write(name, kind, content).name}")
    others = content.get("used_by_others") or 0
    if others > BUSY:
        print(f"others used {others:.0%} of the machine meanwhile: do not trust these timings", file=sys.stderr)


def read_all() -> dict[str, dict[str, Any]]:
    """Everything that was measured, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
