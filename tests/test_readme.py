"""What the README shows is run here, so that it stays true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(
    r"^(?:\S+=\S+ |.*\| )?fewfire (\w+)", "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)), re.M
)


def test_embedding_takes_ten_lines():
    assert PYTHON
    assert len([line for line in PYTHON[0].splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("code", PYTHON)
def test_python_examples_run(code: str, smollm2_path: Path):
    code = code.replace('"smollm2"', repr(str(smollm2_path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_command_is_shown_and_exists():
    from fewfire_cli.main import cli

    assert set(COMMANDS) == set(cli.commands)


def test_options_exist():
    from fewfire_cli.main import cli

    known = {"--help"} | {
        o for c in [cli, *cli.commands.values()] for p in c.params for o in [*p.opts, *p.secondary_opts]
    }
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README))
    assert shown <= known


def test_commands_with_json_are_named():
    from fewfire_cli.main import cli

    (sentence,) = re.findall(r"[^.]*have `--json`\.", README)
    named = set(re.findall(r"`(\w+)`", sentence))
    assert named == {name for name, c in cli.commands.items() if any("--json" in p.opts for p in c.params)}


def test_figures_have_a_place():
    assert README.count("<!-- figures:begin -->") == README.count("<!-- figures:end -->") == 1
