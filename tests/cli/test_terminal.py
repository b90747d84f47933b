import io

import pytest

from fewfire_cli import progress, terminal
from fewfire_cli.progress import ProgressBar, bar


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("width", [0, 1, 10, 20, 30, 40, 80, 200])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 1.5])
def test_a_bar_never_wraps(width, share):
    line = bar("packing smollm2 as q4", int(share * 1000), 1000, width)
    assert len(line) <= width


def test_bar():
    assert bar("packing", 1, 4, 40) == "packing [######-------------------]  25%"
    assert bar("packing", 1, 4, 12) == "25% packing"
    assert bar("fetching", 5, 0, 80) == "fetching ..."


def test_no_terminal_gets_a_line_per_stage(capsys):
    with ProgressBar() as show:
        for i in range(5):
            show("fetching", i, 5)
        show("packing", 0, 1)
    assert capsys.readouterr().err == "fetching ...\npacking ...\n"


def test_a_terminal_gets_one_line_that_is_wiped(monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "_SHOW_AFTER", 0)
    with ProgressBar() as show:
        show("packing", 1, 2)
    assert "packing [" in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[K")
    assert "\n" not in screen.getvalue()


def test_a_quick_stage_does_not_flash_by(monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    with ProgressBar() as show:
        show("packing", 1, 2)
    assert screen.getvalue() == ""


def test_a_model_does_not_drive_the_terminal(monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    terminal.write("a\x1b[31m\x07\x9b31mb\n\tü🦊\x7f\r")
    assert screen.getvalue() == "a[31m31mb\n\tü🦊"


def test_a_pipe_gets_what_the_model_said(capsys):
    terminal.write("a\x1b[31m")
    assert capsys.readouterr().out == "a\x1b[31m"


@pytest.mark.parametrize("why", ["NO_COLOR", "TERM", "--no-color", None])
def test_colour_on_a_terminal(monkeypatch, why):
    import click

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "dumb" if why == "TERM" else "xterm")
    if why == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    command = click.command()(terminal.color_option(lambda: terminal.note("hello")))
    command.main(["--no-color"] if why == "--no-color" else [], standalone_mode=False)
    assert ("\x1b[" in screen.getvalue()) == (why is None)
