"""Where a model's weights lie, and giving memory back to the system.

Every token walks through the whole of a model. In pages of 4 KB that is a walk through the page tables every few rows,
and for rows here and there one for each, which costs more than the row (perf/LOG.md, "pages of two megabytes"). Files
get pages as their file system likes; memory of our own gets large ones from Linux for the asking.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

_LARGE = 1 << 21
_PIECE = 1 << 25  # bytes of a file that one thread reads at a time


def mapped(file: BinaryIO) -> np.ndarray:
    """The bytes of a file, read when they are looked at. Raises `OSError`, and `ValueError` for an empty one."""
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def held(file: BinaryIO, threads: int) -> np.ndarray:
    """The same, read-only too, in large pages.

    But mapped where there are none to be had, and where the file would take more than half of the memory that is free.
    """
    size = os.fstat(file.fileno()).st_size
    if not _has_large_pages() or size > _free() // 2:
        return mapped(file)
    try:
        pages = mmap.mmap(-1, size + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return mapped(file)
    whole = np.frombuffer(pages, np.uint8)
    held = whole[-whole.ctypes.data % _LARGE :][:size]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda at: _read(file, held[at : at + _PIECE], at), range(0, size, _PIECE)))
    held.flags.writeable = False
    return held


def _read(file: BinaryIO, into: np.ndarray, at: int) -> None:
    while into.size:
        read = os.preadv(file.fileno(), [into.data], at)
        if read == 0:
            raise OSError(errno.EIO, "it was cut off just now")
        into, at = into[read:], at + read


def _has_large_pages() -> bool:
    try:
        return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False  # not Linux


def _free() -> int:
    """Bytes that this process may take: those that the system has to give, or fewer where a container has a limit."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(0, limit - used))  # "max" is no number: no limit
    return free


def trim() -> None:
    """Returns what the heap no longer uses, where the C library can: parsing a tokenizer leaves 30 MB of it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no such call
            ctypes.CDLL(None).malloc_trim(0)
