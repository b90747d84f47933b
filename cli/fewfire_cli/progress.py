"""A progress bar on stderr for the engine's progress callback."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType

from fewfire_cli import terminal

_EVERY = 0.1  # seconds between two drawings
_SHOW_AFTER = 0.3  # a stage that is over sooner does not flash by


class ProgressBar:
    """`with ProgressBar() as progress:` and hand `progress` to the engine.

    On a terminal one line that is drawn over and wiped at the end; elsewhere one line when a stage begins.
    """

    def __init__(self) -> None:
        self._live = terminal.is_terminal(sys.stderr)
        self._stage = ""
        self._began = self._drawn = 0.0
        self._shown = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.clear()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self.clear()
            self._stage, self._began = stage, now
            if not self._live:
                print(f"{stage} ...", file=sys.stderr, flush=True)
        if self._live and now - self._began >= _SHOW_AFTER and now - self._drawn >= _EVERY:
            width = shutil.get_terminal_size().columns
            print("\r\x1b[K" + bar(stage, done, total, width - 1), end="", file=sys.stderr, flush=True)
            self._drawn, self._shown = now, True

    def clear(self) -> None:
        """Wipes the line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False


def bar(stage: str, done: int, total: int, width: int) -> str:
    """`stage [####----]  42%`, cut to what fits into `width` columns; no bar where the total is unknown."""
    if total <= 0:
        return f"{stage} ..."[: max(width, 0)]
    share = min(max(done / total, 0.0), 1.0)
    percent = f"{share:4.0%}"
    room = min(width - len(stage) - len(percent) - 4, 40)
    if room < 5:
        return f"{percent.strip()} {stage}"[: max(width, 0)]
    full = round(share * room)
    return f"{stage} [{'#' * full}{'-' * (room - full)}] {percent}"
