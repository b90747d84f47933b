"""What the command knows about terminals: whether there is one, colour, and text that is safe to show on
it.
"""

from __future__ import annotations

import os
import sys
from typing import IO, Any

import click

_HIDDEN = {c: None for c in [*range(32), 127, *range(128, 160)] if chr(c) not in "\n\t"}


def prepare_streams() -> None:
    """A character that the locale's encoding lacks becomes a question mark rather than an exception."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def is_terminal(stream: IO[Any]) -> bool:
    """Whether a person sits at the other end."""
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def _set_color(ctx: click.Context, _: click.Parameter, no_color: bool) -> None:
    # Click itself leaves colour out where the output is no terminal.
    if no_color or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        ctx.color = False


color_option = click.option(
    "--no-color",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_color,
    help="Plain text (also: NO_COLOR=1).",
)


def error(message: str) -> None:
    """One line on stderr, whatever the message has in it."""
    click.echo("fewfire: " + " ".join(printable(message).split()), err=True)


def note(message: str) -> None:
    """A remark for the person at the terminal, on stderr, less prominent than the answer."""
    click.secho(message, dim=True, err=True)


def printable(text: str) -> str:
    """Without control characters: a model's output must not drive the terminal."""
    return text.translate(_HIDDEN)


def write(text: str) -> None:
    """Text of a model to stdout at once; exactly as it is when stdout is no terminal."""
    # Not through click, which would take what looks like colour out of it.
    sys.stdout.write(printable(text) if is_terminal(sys.stdout) else text)
    sys.stdout.flush()
