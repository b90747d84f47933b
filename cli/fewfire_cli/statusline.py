"""A line at the bottom of the terminal that stays there while text is written above it.

The terminal is told to scroll only the rows above the last one (VT100's scrolling region, as apt does for its progress
bar), and is given all its rows back in the end, whatever happens. Nothing at all is written where standard error is no
terminal, or one too simple for that.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from types import TracebackType

from fewfire_cli import terminal

_EVERY = 0.1  # seconds between two drawings
_LEAST_ROWS = 4
_SAVE, _RESTORE = "\x1b7", "\x1b8"  # the cursor


class StatusLine:
    """`with StatusLine(wanted) as status:` and then `status.show(text)` as often as you like."""

    def __init__(self, wanted: bool) -> None:
        capable = terminal.is_terminal(sys.stderr) and os.environ.get("TERM", "") not in ("", "dumb")
        self._live = wanted and capable and shutil.get_terminal_size().lines >= _LEAST_ROWS
        self._size = os.terminal_size((0, 0))  # at which the region was set; none yet
        self._drawn = 0.0

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._size.lines:
            _write(f"{_SAVE}\x1b[r\x1b[{self._size.lines};1H\x1b[K{_RESTORE}")

    def show(self, text: str) -> None:
        """Puts a text in the line, cut to its width, unless one was put there just now."""
        now = time.monotonic()
        if not self._live or now - self._drawn < _EVERY:
            return
        size = shutil.get_terminal_size()
        region = ""
        if size != self._size:
            # If the cursor is in the last row, all must move up by one first. To set a region moves the cursor.
            region = f"\x1bD\x1bM{_SAVE}\x1b[1;{size.lines - 1}r{_RESTORE}"
            self._size = size
        line = f"\x1b[{size.lines};1H\x1b[K\x1b[2m{text[: size.columns - 1]}\x1b[0m"
        _write(f"{region}{_SAVE}{line}{_RESTORE}")
        self._drawn = now


def _write(text: str) -> None:
    sys.stdout.flush()  # what was written before belongs above
    sys.stderr.write(text)
    sys.stderr.flush()
