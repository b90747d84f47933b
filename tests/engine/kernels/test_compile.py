"""Machine code on disk: found again by the next process, and not needed where it cannot be kept."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from fewfire.kernels.compile import CACHE_DIR, primitive
from fewfire.kernels.pointwise import _I, rotate

# A small kernel that is compiled or found, and what it computes.
USE = """
    import numpy as np
    from fewfire.kernels.compile import CACHE_DIR
    from fewfire.kernels.pointwise import rotate
    print(rotate.cached, CACHE_DIR)
    vector, cos, sin = np.float32([3, 4]), np.float32([0]), np.float32([1])
    rotate(*(a.ctypes.data for a in (vector, cos, sin)), 1)
    print(vector.tolist())
"""
TURNED = "[-4.0, 3.0]"


def run(code: str, cache: Path) -> list[str]:
    """The lines that a new process with this cache directory prints."""
    environment = {**os.environ, "FEWFIRE_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_compiled_once_for_all_processes(tmp_path: Path) -> None:
    first, second = run(USE, tmp_path), run(USE, tmp_path)
    assert first[0].startswith(f"False {tmp_path}")
    assert second[0] == first[0].replace("False", "True")
    assert first[1] == second[1] == TURNED


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run(USE, tmp_path / "file")[1] == TURNED


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits")
@pytest.mark.parametrize("size", [0, 2000])
def test_a_full_disk(size: int, tmp_path: Path) -> None:
    limit = f"""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    """
    assert run(limit + USE, tmp_path)[1] == TURNED
    # What it left there is no hindrance to a process that has room.
    assert run(USE, tmp_path)[1] == TURNED


@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_a_damaged_cache(damage: str, tmp_path: Path) -> None:
    """As a power cut leaves it. The process that finds it removes it, the next one fills it again."""
    run(USE, tmp_path)
    for file in tmp_path.rglob("*.nb*"):
        data = file.read_bytes()
        file.write_bytes(data[:-10] if damage == "cut" else bytes(len(data)))
    assert run(USE, tmp_path)[1] == TURNED
    assert run(USE, tmp_path)[0].startswith("False")
    assert run(USE, tmp_path)[0].startswith("True")


def test_several_threads_at_once() -> None:
    made = primitive(_I)(lambda value: None)
    addresses: list[int] = []
    threads = [threading.Thread(target=lambda: addresses.append(made.address)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(addresses) == 4
    assert len(set(addresses)) == 1


def test_here() -> None:
    assert rotate.address == rotate.address
    assert rotate.cached
    assert CACHE_DIR.is_dir()
