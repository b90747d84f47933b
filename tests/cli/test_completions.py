import os
import shutil
import subprocess

import pytest

from commandline import PROGRAM, run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell):
    result = run("completions", shell)
    assert (result.code, result.err) == (0, "")
    assert "_FEWFIRE_COMPLETE=" + shell in result.out.replace("env ", "")


def test_other_shells():
    run("completions", "csh").failed(2, "csh", "bash")
    run("completions").failed(2, "bash")


def test_what_the_shell_asks_for():
    environment = os.environ | {"_FEWFIRE_COMPLETE": "bash_complete", "COMP_WORDS": "fewfire ge", "COMP_CWORD": "1"}
    done = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["plain,generate"]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_takes_the_script():
    script = run("completions", "bash").out + "\ncomplete -p fewfire"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert "_fewfire_completion" in done.stdout
