import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fewfire
from commandline import PROGRAM, run
from fewfire.errors import FewfireError
from fewfire_cli.main import cli
from fewfire_cli.options import DEFAULT_MODEL

COMMANDS = sorted(cli.commands)


def test_version():
    assert run("--version").out == f"fewfire {fewfire.__version__}\n"


def test_the_default_model_is_an_alias():
    from fewfire.sources import ALIASES

    assert DEFAULT_MODEL in ALIASES
    assert inspect.signature(fewfire.load).parameters["source"].default == DEFAULT_MODEL


def test_every_alias_is_shown():
    from fewfire.sources import ADAPTED, ALIASES

    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"MODEL is an alias \((.*?)\)", " ".join(run("--help").out.split()))
    assert named.split(", ") == [*ALIASES, *ADAPTED]
    (row,) = re.findall(r"^\| an alias \|.*", readme, re.M)
    assert all(f"`{name}` (" in row for name in (*ALIASES, *ADAPTED))


def test_help_lists_every_command():
    out = run("--help").out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert run("-h").out == out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert f"Example:\n    fewfire {command}" in result.out or f"fewfire {command}" in result.out.split("Example:")[1]
    assert max(map(len, result.out.splitlines())) <= 80


def every_command(group, path=()):
    for name, command in group.commands.items():
        yield (*path, name)
        yield from every_command(command, (*path, name)) if hasattr(command, "commands") else ()


@pytest.mark.parametrize("command", list(every_command(cli)), ids=" ".join)
def test_every_command_can_do_without_colour(command):
    assert "--no-color" in run(*command, "--help").out


def test_help_does_not_wait_for_the_engine():
    code = "import sys, fewfire_cli.main; sys.exit('numpy' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nope"], ["nope", "--help"]),
        (["chat", "--nope"], ["--nope", "fewfire chat --help"]),
        (["generate", "m", "p", "--top-k", "x"], ["--top-k", "fewfire generate --help"]),
        (["chat", "--weights", "q3"], ["q3", "q4"]),
        (["pack", "smollm2"], ["OUT"]),
    ],
)
def test_usage_errors(args, words):
    run(*args).failed(2, *words)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("top_p must be\nless"), 2, "top_p must be less"),
        (FewfireError("no \x1b[31mmodel"), 1, "no [31mmodel"),
        (FileNotFoundError(2, "No such file", "x.txt"), 1, "x.txt: No such file"),
        (OSError(28, "No space left"), 1, "No space left"),
        (MemoryError(), 1, "not enough memory"),
    ],
)
def test_every_error_is_one_line(monkeypatch, error, code, text):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(fewfire, "load", load)
    run("generate", "m", "p").failed(code, text)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(fewfire, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("generate", "m", "p")


def test_ctrl_c(monkeypatch):
    def load(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fewfire, "load", load)
    result = run("generate", "m", "p")
    assert (result.code, result.out, result.err.strip()) == (130, "", "")


def test_a_reader_that_has_had_enough_is_no_error():
    program = subprocess.Popen([*PROGRAM, "completions", "bash"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    assert program.stderr.read() == b""
    program.stderr.close()
    assert program.wait() == 1


def test_text_that_the_locale_cannot_write():
    code = "from fewfire_cli.terminal import *; prepare_streams(); write('f\\u00fcr \\U0001f98a')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"f?r ?")
