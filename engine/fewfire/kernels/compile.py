"""How kernels are compiled and where the machine code is kept: the `kernel` decorator.

Numba checks only the file of the outermost function when it looks into its on-disk cache, so an edit of a callee in
another file would leave stale machine code. Our cache directory therefore carries a hash of every kernel source, of the
versions involved and of the vector level; Numba adds the CPU and its features itself.
"""

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba import types

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


_OPTIONS = {"error_model": "numpy", "boundscheck": False}


def inline(function: Callable[..., Any]) -> Any:
    """A piece of a kernel: always inlined into its caller, without an entry point of its own."""
    return numba.njit(function, forceinline=True, no_cpython_wrapper=True, **_OPTIONS)


@contextlib.contextmanager
def _our_cache() -> Iterator[None]:
    previous = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(CACHE_DIR)  # read when a compiler object is made, so the setting stays ours alone
    try:
        yield
    finally:
        numba.config.CACHE_DIR = previous


def kernel(function: Callable[..., Any]) -> Any:
    """A compiled function that Python calls: releases the GIL and is cached on disk."""
    with _our_cache():
        return numba.njit(function, nogil=True, cache=True, **_OPTIONS)


class Primitive:
    """A compiled function that kernels call by its address (`simd.call`).

    Numba compiles the code of a called function again with each caller, and Python functions as arguments defeat its
    disk cache. So what is large or differs between number formats is compiled once, on first use, and the kernels that
    orchestrate it know only addresses: they are the same machine code for every format.
    """

    def __init__(self, function: Callable[..., None], *arguments: types.Type) -> None:
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self._function, self._signature = function, types.void(*arguments)
        self._lock = threading.Lock()
        self._compiled: Any = None

    def _compile(self) -> Any:
        with self._lock:
            if self._compiled is None:
                with _our_cache():
                    self._compiled = numba.cfunc(self._signature, cache=True, **_OPTIONS)(self._function)
        return self._compiled

    @property
    def address(self) -> int:
        """Where the machine code begins; compiles if need be."""
        return int(self._compile().address)

    def __call__(self, *arguments: float) -> None:
        """Calls it from Python, for tests and benchmarks."""
        self._compile().ctypes(*arguments)


def primitive(*arguments: types.Type) -> Callable[[Callable[..., None]], Primitive]:
    """Makes a `Primitive` of a function with these argument types and no result. Addresses are int64."""
    return lambda function: Primitive(function, *arguments)
