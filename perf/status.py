"""What a long measurement is at, on a terminal."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """A status line that overwrites the one before; empty to wipe it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def progress(stage: str, done: int, total: int) -> None:
    """The same for what reports its progress (`fewfire.progress`)."""
    say(f"{stage} ({done} of {total})")
