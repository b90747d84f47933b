"""How pieces are compiled changes what it costs, not what they compute."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fewfire.kernels import piece

PROGRAM = """
import sys
import numba._dynfunc
if "other numba" in sys.argv:
    del numba._dynfunc.make_function
import numpy as np
from fewfire.kernels import piece, pointwise
from numba.core.compiler import Compiler
assert (piece.PieceCompiler is Compiler) == ("other numba" in sys.argv)
x, ones, out = np.linspace(-4, 4, 64, dtype=np.float32), np.ones(64, np.float32), np.full(64, np.nan, np.float32)
pointwise.rms_norm(x.ctypes.data, ones.ctypes.data, 1e-5, 64, out.ctypes.data)
print(out.tobytes().hex())
"""


@pytest.mark.parametrize("numba", ["this numba", "other numba"])
def test_with_and_without(numba: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWFIRE_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(piece.__file__).parents[2]))
    done = subprocess.run([sys.executable, "-c", PROGRAM, numba], capture_output=True, text=True, check=True)
    theirs = bytes.fromhex(done.stdout.strip())
    x = np.linspace(-4, 4, 64, dtype=np.float32)
    np.testing.assert_allclose(np.frombuffer(theirs, np.float32), x / np.sqrt((x * x).mean() + 1e-5), rtol=1e-5)
