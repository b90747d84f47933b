"""All levels that this CPU runs compute the same, and a level that it does not run is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import levels
from fewfire.kernels.level import LEVEL, LEVELS, available


def run(level: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FEWFIRE_SIMD": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_best_level_is_chosen() -> None:
    assert available()[-1] == "plain"
    assert set(available()) <= set(LEVELS)
    if "FEWFIRE_SIMD" not in os.environ:
        assert available()[0] == LEVEL


@pytest.mark.parametrize("level", [level for level in available() if level != LEVEL])
def test_levels_agree(level: str, tmp_path: Path) -> None:
    """Integers to the bit, floats to their rounding; `levels.py` also compares each with its twin."""
    done = run(level, Path(levels.__file__), tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    ours = levels.results()
    with np.load(tmp_path / "out.npz") as theirs:
        assert theirs.files == list(ours)
        for name, values in ours.items():
            if values.dtype == np.float32:
                np.testing.assert_allclose(theirs[name], values, rtol=1e-6, atol=1e-6 * np.nanmax(np.abs(values)))
            else:
                np.testing.assert_array_equal(theirs[name], values, err_msg=name)


@pytest.mark.parametrize("level", ["sse9", "", *(level for level in LEVELS if level not in available())])
def test_a_level_that_this_cpu_lacks_is_refused(level: str) -> None:
    done = run(level, "-c", "import fewfire.kernels.level")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ValueError: FEWFIRE_SIMD={level}: this CPU runs ")


def test_levels_keep_their_machine_code_apart() -> None:
    code = "from fewfire.kernels.compile import CACHE_DIR; print(CACHE_DIR)"
    directories = [run(level, "-c", code).stdout for level in available()]
    assert len(set(directories)) == len(available())
