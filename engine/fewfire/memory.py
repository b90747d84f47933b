"""Where a model's weights lie, and giving memory back to the system.

A token walks through most of a model. In pages of 4 KB that is a walk through the page tables every few rows, and for
rows here and there one for each, which costs more than the row (perf/LOG.md, "pages of two megabytes"). Files get pages
as their file system likes; memory of our own gets large ones from Linux for the asking.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from fewfire.progress import Progress, silent

_HELD: weakref.WeakValueDictionary[tuple[int, ...], np.ndarray] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()
_LINE = 64  # bytes
_PIECE = 1 << 25  # bytes of a file that one thread reads at a time
_LONG = 1 << 30  # bytes that take long enough to say so
_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
# Of a container, by version of Linux's control groups: where they are; the files with the limit, with what is used, and
# the name in `memory.stat` of what of that is cached files and would be given up.
_GROUPS = {
    1: (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
}


def contents(file: BinaryIO, threads: int = 0, progress: Progress = silent) -> np.ndarray:
    """The bytes of a file, read-only: mapped, or read by so many threads into large pages.

    It is mapped without threads, where the system has no large pages or the file would not fill one, and where it would
    take more than half of the memory that is free. Who asks for a file that was read and is still in use gets the same
    bytes. Raises `OSError`, and `ValueError` for an empty file.
    """
    found, page = os.fstat(file.fileno()), _large_page()
    if threads and 0 < page <= found.st_size:
        known = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        with _LOCK:
            data = _HELD.get(known)
            if data is None and found.st_size <= _free() // 2:
                data = _held(file, found.st_size, page, threads, progress)
            if data is not None:
                _HELD[known] = data
                return data
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _held(file: BinaryIO, size: int, page: int, threads: int, progress: Progress) -> np.ndarray | None:
    """The bytes of a file in large pages; None if the system gives none."""
    data = _in_pages(size, page)
    if data is None:
        return None
    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(lambda at: _read(file, data[at : at + _PIECE], at), range(0, size, _PIECE)):
            if size > _LONG:
                progress("reading the model", done, size)
    data.flags.writeable = False
    return data


def together(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies of arrays one after the other in large pages, as they are when they come from a file.

    The arrays themselves where the system has no such pages, they would not fill one, or they would take more than half
    of the memory that is free.
    """
    starts = np.cumsum([0, *(-(-array.nbytes // _LINE) * _LINE for array in arrays.values())]).tolist()
    page = _large_page()
    data = _in_pages(starts[-1], page) if 0 < page <= starts[-1] <= _free() // 2 else None
    if data is None:
        return dict(arrays)
    found = {}
    for (name, array), start in zip(arrays.items(), starts[:-1], strict=True):
        found[name] = data[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        found[name][...] = array
    return found


def _in_pages(size: int, page: int) -> np.ndarray | None:
    """So many bytes in large pages; None if the system gives none."""
    try:
        pages = mmap.mmap(-1, (size // page + 2) * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    whole = np.frombuffer(pages, np.uint8)
    return whole[-whole.ctypes.data % page :][:size]


def _read(file: BinaryIO, into: np.ndarray, at: int) -> int:
    """Fills `into` with the file's bytes from `at` on; returns where they end."""
    while into.size:
        read = os.preadv(file.fileno(), [into.data], at)
        if read == 0:
            raise OSError(errno.EIO, "it was cut off just now")
        into, at = into[read:], at + read
    return at


def _large_page() -> int:
    """Bytes of a large page, 0 where there are none."""
    try:
        if "[never]" in (_PAGES / "enabled").read_text():
            return 0
        return int((_PAGES / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0  # not Linux


def _free() -> int:
    """Bytes that this process may take: those that the system has to give, or fewer where it is in a container."""
    free = 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024 * int(line.split()[1])
    return max(0, min([free, *_left()]))


def _left() -> Iterator[int]:
    """Bytes that the limits of control groups leave to this process, those of the groups around its own included."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, group = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            root, limit, used, cached = _GROUPS[1 if kinds else 2]
            for each in (PurePosixPath(group), *PurePosixPath(group).parents):
                place = root / each.relative_to("/")
                with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                    stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                    spent = int((place / used).read_text()) - int(stat.get(cached, 0))
                    yield int((place / limit).read_text()) - spent


def trim() -> None:
    """Returns what the heap no longer uses, where the C library can: parsing a tokenizer leaves 30 MB of it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no such call
            ctypes.CDLL(None).malloc_trim(0)
