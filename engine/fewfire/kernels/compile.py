"""How kernels are compiled, and where the machine code is kept.

Numba checks only the file of the outermost function when it looks into its on-disk cache, so an edit of a callee in
another file would leave stale machine code. Our cache directory therefore carries a hash of every kernel source, of
where they lie, of the versions involved and of the vector level; Numba adds the CPU and its features itself.
"""

import atexit
import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types

from fewfire.cache import cache_dir
from fewfire.kernels.level import LEVEL
from fewfire.kernels.piece import PieceCompiler


def _kernel_cache_dir() -> Path:
    here = Path(__file__).parent
    digest = hashlib.sha256(f"{numba.__version__} {sys.implementation.cache_tag} {LEVEL} {here}".encode())
    for source in sorted(here.glob("*.py")):
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
    atexit.register(shutil.rmtree, CACHE_DIR, ignore_errors=True)

# Where Numba is to keep machine code is a setting of the whole process, read when a compiler is made. It is ours only
# while this lock is held.
_LOCK = threading.RLock()
_KEPT_DAYS = 30  # machine code of other versions, since it was last written


def _prune() -> None:
    """Removes the machine code of versions that have not compiled anything for a while."""
    for directory in CACHE_DIR.parent.glob("*"):
        with contextlib.suppress(OSError):
            if directory != CACHE_DIR and time.time() - directory.stat().st_mtime > 86400 * _KEPT_DAYS:
                shutil.rmtree(directory, ignore_errors=True)


# Kernels allocate nothing, so nothing is counted, and have no expressions that Numba's rewrites would help with.
_OPTIONS = {"error_model": "numpy", "boundscheck": False, "_nrt": False, "no_rewrites": True}


_PIECE = {"pipeline_class": PieceCompiler, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, **_OPTIONS}

# Numba compiles a piece anew for every literal among its arguments. To Numba, these are none.
ZERO, ONE = np.int64(0), np.int64(1)


def inline(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that is always inlined into its caller."""
    return numba.njit(function, forceinline=True, **_PIECE)


def step(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that is long and runs seldom: LLVM may keep one copy for all its callers in a kernel."""
    return numba.njit(function, **_PIECE)


class Compiled:
    """A function that is compiled on first use, or taken from the disk cache."""

    def __init__(self, function: Callable[..., Any], *arguments: types.Type, result: types.Type = types.void) -> None:
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self._function, self._signature = function, result(*arguments)
        self._made: Any = None

    @property
    def cached(self) -> bool:
        """Whether it is compiled: in this process, or by an earlier one that has left the machine code on disk."""
        return self._made is not None or any(self._files())

    def _files(self) -> Iterator[Path]:
        return CACHE_DIR.rglob(f"*.{self.__name__}-*.nb[ci]")

    def compile(self) -> Any:
        """What Numba makes of the function; compiles it if need be."""
        with _LOCK:
            if self._made is None:
                if not self.cached:
                    _prune()
                previous = numba.config.CACHE_DIR
                numba.config.CACHE_DIR = str(CACHE_DIR)  # read when a compiler is made, so the setting stays ours alone
                try:
                    self._made = self._compile(cache=True)
                except Exception:  # the disk is full, or what is on it is damaged: the next process tries again
                    for file in list(self._files()):
                        with contextlib.suppress(OSError):
                            file.unlink()
                    self._made = self._compile(cache=False)
                finally:
                    numba.config.CACHE_DIR = previous
        return self._made

    def _compile(self, cache: bool) -> Any:
        raise NotImplementedError


class Kernel(Compiled):
    """A compiled function that Python calls; it releases the GIL."""

    def _compile(self, cache: bool) -> Any:
        return numba.njit(self._signature, nogil=True, no_cfunc_wrapper=True, cache=cache, **_OPTIONS)(self._function)

    def __call__(self, *arguments: Any) -> None:
        (self._made or self.compile())(*arguments)


class Primitive(Compiled):
    """A compiled function that kernels call by its address (`simd.call`, or `simd.ask` if it has a result).

    Numba compiles the code of a called function again with each caller, and Python functions as arguments defeat its
    disk cache. So what is large or differs between number formats is compiled once, and the kernels that orchestrate it
    know only addresses: they are the same machine code for every format. Nor is what few models need compiled with the
    kernels for all: its address is 0 where it is not called.
    """

    def _compile(self, cache: bool) -> Any:
        return numba.cfunc(self._signature, cache=cache, **_OPTIONS)(self._function)

    @property
    def address(self) -> int:
        """Where the machine code begins."""
        return int(self.compile().address)

    def __call__(self, *arguments: float) -> None:
        """Calls it from Python."""
        self.compile().ctypes(*arguments)


def kernel(*arguments: types.Type) -> Callable[[Callable[..., None]], Kernel]:
    """Makes a `Kernel` of a function with these argument types and no result."""
    return lambda function: Kernel(function, *arguments)


def primitive(*arguments: types.Type, result: types.Type = types.void) -> Callable[[Callable[..., Any]], Primitive]:
    """Makes a `Primitive` of a function with these argument types and result. Addresses are int64."""
    return lambda function: Primitive(function, *arguments, result=result)


def records(dtype: np.dtype) -> types.Type:
    """The type of an array of records."""
    return numba.typeof(np.zeros(1, dtype))


def one(dtype: np.dtype) -> types.Type:
    """The type of a record in such an array."""
    return records(dtype).dtype
