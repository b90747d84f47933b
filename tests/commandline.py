"""Running the `fewfire` command in tests: in this process, which is quick, or as a program of its own."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from fewfire_cli.main import main

PROGRAM = [sys.executable, "-m", "fewfire_cli"]


@dataclass
class Result:
    code: int
    out: str
    err: str

    def failed(self, code: int, *words: str) -> None:
        """Asserts a clean failure: this exit code, and one line on stderr that has the words."""
        assert self.code == code, self
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if not line.endswith(" ...")]  # leaving out progress
        assert len(lines) == 1, self
        assert lines[0].startswith("fewfire: ")
        for word in words:
            assert word in lines[0]


def run(*args: object, stdin: bytes | str = b"") -> Result:
    """`fewfire ARGS` in this process, with pipes for all three streams."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for name in ("stdout", "stderr")}
    streams["stdin"] = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    with mock.patch.multiple(sys, **streams):
        try:
            main([str(a) for a in args])
        except SystemExit as end:
            code = end.code
    for stream in streams.values():
        stream.flush()
    assert isinstance(code, int)
    return Result(code, *(streams[s].buffer.getvalue().decode() for s in ("stdout", "stderr")))


@contextmanager
def typed(*args: object, **environment: str) -> Iterator[Terminal]:
    """`fewfire ARGS` as a program at a terminal."""
    import fcntl  # these are not on Windows, where the tests that call this are skipped
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a new one has no columns

    def become_its_foreground() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that ^C reaches it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which is ignored where the tests run in a shell's background

    program = subprocess.Popen(
        [*PROGRAM, *map(str, args)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=become_its_foreground,
        env=os.environ | {"TERM": "xterm"} | environment,
    )
    os.close(theirs)
    try:
        yield Terminal(ours, program)
    finally:
        program.kill()
        program.wait()
        os.close(ours)


class Terminal:
    """What a person does at a terminal: type, and wait for something to appear."""

    def __init__(self, fd: int, program: subprocess.Popen[bytes]) -> None:
        self.fd, self.program, self.screen = fd, program, ""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: str, timeout: float = 60) -> str:
        """Waits until `text` appears after what was waited for last; returns what came before it."""
        end = time.monotonic() + timeout
        while (at := self.screen.find(text, self._seen)) < 0:
            assert self._read(end), f"{text!r} did not appear in {self.screen[self._seen :]!r}"
        before = self.screen[self._seen : at]
        self._seen = at + len(text)
        return before

    def wait_for_anything(self, timeout: float = 60) -> None:
        """Waits until anything appears after what was waited for last."""
        end = time.monotonic() + timeout
        while len(self.screen) == self._seen:
            assert self._read(end), "nothing appeared"

    def _read(self, end: float) -> bool:
        """Takes what the program has written, waiting for it until `end`; whether there was anything."""
        ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
        try:
            data = os.read(self.fd, 65536) if ready else b""
        except OSError:  # the program has ended
            return False
        self.screen += data.decode(errors="replace")
        return bool(data)

    def ends(self, timeout: float = 30) -> int:
        """Waits for the program to end; returns its exit code."""
        return self.program.wait(timeout)
