"""Lines typed by a person, with editing and a history where the system has readline."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from types import TracebackType

try:
    import readline
except ImportError:  # Windows; its console edits lines by itself
    readline = None  # type: ignore[assignment]

import click

_KEEP = 1000  # lines of history


class LineInput:
    """`with LineInput(commands) as lines: lines.read(">>> ")`. The history lies in fewfire's cache
    directory.
    """

    def __init__(self, commands: Iterable[str] = ()) -> None:
        from fewfire.cache import cache_dir

        self._commands = sorted(commands)
        self._file = cache_dir() / "chat_history"

    def __enter__(self) -> LineInput:
        if readline:
            with contextlib.suppress(OSError):  # none yet, or not readable: then there is no history
                readline.read_history_file(self._file)
            readline.set_history_length(_KEEP)
            readline.set_completer_delims(" ")
            readline.set_completer(self._complete)
            libedit = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if readline:
            with contextlib.suppress(OSError):  # a cache that cannot be written costs the history, not the chat
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._file.touch(mode=0o600)
                readline.write_history_file(self._file)

    def read(self, prompt: str) -> str:
        """The next line. `EOFError` at Ctrl-D."""
        if sys.stdout.isatty():
            return input(prompt)
        click.echo(prompt, nl=False, err=True)  # stdout goes to a file, which the prompt must not
        return input()

    def _complete(self, text: str, state: int) -> str | None:
        fits = [c + " " for c in self._commands if c.startswith(text)] if text.startswith("/") else []
        return fits[state] if state < len(fits) else None
