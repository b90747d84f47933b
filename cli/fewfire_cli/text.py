"""Text that comes in: from a file or a pipe, as UTF-8 or not at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path


def read_stdin() -> str:
    """All of standard input."""
    return decode(sys.stdin.buffer.read(), "standard input")


def stdin_lines() -> Iterator[str]:
    """Standard input line by line, each as soon as it is there, without its line end."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decode(line, f"line {number} of standard input").rstrip("\r\n")


def read_text(path: Path) -> str:
    """A text file."""
    return decode(path.read_bytes(), str(path))


def decode(data: bytes, what: str) -> str:
    """Strict UTF-8, without the byte order mark that some editors put in front."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not UTF-8 (byte {error.start} is {data[error.start]:#04x}): convert it first"
        ) from None
