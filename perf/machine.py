"""The machine: what it is, how fast it reads memory, and whether it was ours alone while we measured.

Promises that nothing in a description tells whose machine it is: no paths, no host name.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np

from fewfire import __version__
from fewfire.kernels.level import LEVEL
from fewfire.team import default_threads
from perf.spread import Spread, spread

_LIBRARIES = ("numpy", "numba", "llvmlite", "llama-cpp-python", "ctranslate2", "torch", "transformers")
_LEAST_SECONDS = 0.03  # of one bandwidth sample, so that starting the threads does not count


def describe() -> dict[str, Any]:
    """CPU, cores, caches, memory, the level of our kernels, and versions of what was measured."""
    versions = {"fewfire": f"{__version__} at {_commit()}", "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_name(),
        "llvm_cpu": llvm.get_host_cpu_name(),
        "cores": default_threads(),
        "caches": _caches(),
        "memory_gb": round(_memory() / 1e9, 1),
        "level": LEVEL,
        "system": platform.system(),
        "versions": versions,
    }


def _commit() -> str:
    """The last commit that changed the engine; with "+" if files of it differ from that."""
    engine = Path(__file__).parent.parent / "engine"
    try:
        commit = _git("log", "-1", "--format=%h", "--abbrev=8", "--", str(engine))
        return commit + ("+" if _git("status", "--porcelain", "--", str(engine)) else "")
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


# --- how fast it reads ------------------------------------------------------------------------------------------------


@numba.njit(nogil=True)
def _read_one(values: np.ndarray, passes: int) -> int:
    """Sum over one stream; LLVM keeps several vector accumulators."""
    total = 0
    for _ in range(passes):
        part = 0
        for i in range(values.size):
            part += values[i]
        total = 3 * total + part
    return total


@numba.njit(nogil=True)
def _read_four(values: np.ndarray, passes: int) -> int:
    """Sum over four streams side by side, which keeps more of the prefetchers busy."""
    total, quarter = 0, values.size // 4
    for _ in range(passes):
        a, b, c, d = 0, 0, 0, 0
        for i in range(quarter):
            a += values[i]
            b += values[i + quarter]
            c += values[i + 2 * quarter]
            d += values[i + 3 * quarter]
        total = 3 * total + a + b + c + d
    return total


class Streams:
    """Measures streaming reads: the bandwidth that no engine can exceed.

    Of two ways to read the faster counts, and memory is in large pages where the system has them, so the bound is
    generous.
    """

    def __init__(self, megabytes: tuple[int, ...] = (100, 2000)) -> None:
        self._arrays = {size: np.ones(size * 10**6 // 8, np.int64) for size in megabytes}
        self._pool = ThreadPoolExecutor()
        self._samples: dict[tuple[int, int], list[float]] = {}
        for read in (_read_one, _read_four):
            read(np.ones(8, np.int64), 1)  # compiles

    def sample(self, threads: int) -> None:
        """Measures each size once more, with so many threads."""
        for size, array in self._arrays.items():
            parts = np.array_split(array, threads)
            best = 0.0
            for read in (_read_one, _read_four):
                passes = max(1, int(_LEAST_SECONDS * 30e9 / array.nbytes))
                start = time.perf_counter()
                jobs = [self._pool.submit(read, part, passes) for part in parts[1:]]
                read(parts[0], passes)
                for job in jobs:
                    job.result()
                best = max(best, passes * array.nbytes / (time.perf_counter() - start) / 1e9)
            self._samples.setdefault((size, threads), []).append(best)

    def bandwidth(self, threads: int, megabytes: float) -> float:
        """GB/s, the median for the array whose size is nearest to that of what an engine reads."""
        nearest = min(self._arrays, key=lambda size: abs(np.log(size / megabytes)))
        return float(np.median(self._samples[nearest, threads]))

    def summary(self) -> list[dict[str, Any]]:
        """All that was measured, GB/s."""
        out: list[dict[str, Any]] = []
        for (size, threads), samples in sorted(self._samples.items()):
            gbps: Spread = spread(samples)
            out.append({"megabytes": size, "threads": threads, "gb_per_second": gbps})
        return out


# --- was it ours alone? -----------------------------------------------------------------------------------------------


class Watch:
    """Tells what share of the machine others used meanwhile (Linux only): timings beside them are worth little."""

    def __init__(self) -> None:
        self._start = self._read()

    def others(self) -> float | None:
        """Share of all cores' time that went to other processes, or was stolen by the host, since this was made."""
        now = self._read()
        if now is None or self._start is None:
            return None
        busy, total, own = (b - a for a, b in zip(self._start, now, strict=True))
        return round(max(0.0, busy - own) / total, 4) if total > 0 else None

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        idle, hertz, own = fields[3] + fields[4], os.sysconf("SC_CLK_TCK"), os.times()
        return (sum(fields) - idle) / hertz, sum(fields) / hertz, sum(own[:4])


def settle(limit: float = 2.0) -> float:
    """Waits until this process's threads have stopped spinning (OpenMP's do for a while); the seconds that took.

    So no contender's idle threads take a core from the next one.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < limit:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(0.02)
        if time.process_time() - cpu < 0.05 * (time.perf_counter() - wall):
            break
    return time.perf_counter() - start


if __name__ == "__main__":
    import json

    streams = Streams()
    for _ in range(5):
        for count in sorted({1, default_threads()}):
            streams.sample(count)
    print(json.dumps(describe() | {"bandwidth": streams.summary()}, indent=1))
