"""How kernels are compiled and where the machine code is kept: the `kernel` decorator.

Numba checks only the file of the outermost function when it looks into its on-disk cache, so an edit of a callee in
another file would leave stale machine code. Our cache directory therefore carries a hash of every kernel source, of the
versions involved and of the vector level; Numba adds the CPU and its features itself.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from fewfire.cache import cache_dir
from fewfire.kernels.level import LEVEL


def _kernel_cache_dir() -> Path:
    digest = hashlib.sha256(f"{numba.__version__} {LEVEL}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return cache_dir() / "kernels" / digest.hexdigest()[:16]


def _writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return os.access(directory, os.W_OK)
    except OSError:
        return False


CACHE_DIR = _kernel_cache_dir()
if not _writable(CACHE_DIR):  # a read-only home compiles anew in every process, but it runs
    CACHE_DIR = Path(tempfile.mkdtemp(prefix="fewfire-kernels-"))


def is_warm() -> bool:
    """Whether an earlier process has left compiled kernels, so that the first token need not wait for the compiler."""
    return any(CACHE_DIR.rglob("*.nbc"))


def inline(function: Callable[..., Any]) -> Any:
    """A piece of a kernel: always inlined into its caller, without an entry point of its own."""
    return numba.njit(function, forceinline=True, error_model="numpy", boundscheck=False, no_cpython_wrapper=True)


def kernel(function: Callable[..., Any]) -> Any:
    """A compiled function that Python calls: releases the GIL and is cached on disk."""
    previous = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(CACHE_DIR)  # read when the dispatcher is made, so the setting stays ours alone
    try:
        return numba.njit(function, nogil=True, cache=True, error_model="numpy", boundscheck=False)
    finally:
        numba.config.CACHE_DIR = previous
