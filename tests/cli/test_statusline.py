"""The line below the text: where it is drawn, and that the terminal gets its rows back."""

import io
import os
import shutil
import sys

import pytest

from commandline import typed
from fewfire_cli import statusline
from fewfire_cli.statusline import StatusLine


class Screen(io.StringIO):
    def isatty(self):
        return True


def at_a_terminal(monkeypatch) -> Screen:
    """Not a fixture, because pytest takes standard error back before a test."""
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 10)))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(statusline, "_EVERY", 0)
    return screen


def test_a_line_in_the_last_row(monkeypatch):
    screen = at_a_terminal(monkeypatch)
    with StatusLine(True) as status:
        status.show("x" * 50)
        first = screen.getvalue()
        status.show("done")
    assert "\x1b[1;9r" in first
    assert "\x1b[10;1H" in first
    assert first.count("x") == 19
    assert screen.getvalue().count("\x1b[1;9r") == 1
    assert screen.getvalue().endswith("\x1b7\x1b[r\x1b[10;1H\x1b[K\x1b8")


def test_the_rows_come_back_after_a_failure(monkeypatch):
    screen = at_a_terminal(monkeypatch)

    def stopped():
        with StatusLine(True) as status:
            status.show("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert "\x1b[r" in screen.getvalue()


@pytest.mark.parametrize("why", ["unwanted", "pipe", "dumb", "small", "no text"])
def test_nothing_is_written(monkeypatch, why):
    screen = at_a_terminal(monkeypatch)
    if why == "pipe":
        monkeypatch.setattr(screen, "isatty", lambda: False)
    if why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if why == "small":
        monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 2)))
    with StatusLine(why != "unwanted") as status:
        if why != "no text":
            status.show("x")
    assert screen.getvalue() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a Unix terminal")
def test_generating_at_a_terminal(model, own_cache):
    with typed("generate", model, "The keeper is", "--max-tokens", 20, "--stats") as terminal:
        terminal.wait_for("\x1b[1;23r")
        terminal.wait_for("this token read 100% of the weights")
        terminal.wait_for("\x1b[r")
        terminal.wait_for("of the weights a token")
        assert terminal.ends() == 0
