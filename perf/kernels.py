"""How fast gather-dot and gather-axpy read listed rows from memory: `python -m perf.kernels`.

For every number format, row length, density and number of threads: GB/s over the bytes of the listed rows, beside a
streaming read in the same round and the gathered read of the same lists (`gathered.py`). Rows come out of a matrix much
larger than any cache, by sorted random lists that are new in every round; at low densities a round works through so
many lists that it reads as many bytes as the matrix has.
Matrices, vectors and the check of each kernel come from `kernel_table.py`, which drives the kernels' tests too. The
second table says what a list costs where it holds every row, beside the same loop without one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from fewfire.buffers import Activation, axpy_scratch
from fewfire.cache import cache_dir
from fewfire.kernels import axpy, gather
from fewfire.kernels.axpy import BLOCK
from fewfire.kernels.compile import Primitive
from fewfire.kernels.gather import FLOATS, INTEGERS, SOON, asking, store_sums
from fewfire.kernels.simd import call, load_i64
from fewfire.packed import PAGE
from fewfire.quantize import FORMATS, padded
from fewfire.team import default_threads
from perf import gathered, kernel_table, machine, results
from perf.decode import bandwidth_line
from perf.spread import pairwise, shown, spread
from perf.table import table

_HOME = {"gather_dot": gather, "gather_axpy": axpy}
KERNELS = tuple(_HOME)
GATHERED = "gathered read"
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
COLUMNS = (576, 1536, 2048, 4096)
_TILE = 256  # rows that are encoded; the matrix repeats them
_CACHED = 200_000  # bytes of rows that a core's own cache holds
_OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False}


@numba.njit(**_OPTIONS)
def _calls_10(address, calls):
    for c in calls:
        call(address, (c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9]))


@numba.njit(**_OPTIONS)
def _calls_9(address, calls):
    for c in calls:
        call(address, (c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8]))


def _without_list(four: Callable[..., Any], block: int) -> Callable[..., None]:
    """Dot products of all rows, whose number is a multiple of four: what a dense engine does."""

    @numba.njit(**_OPTIONS)
    def loop(matrix, stride, count, x, out, passes):
        part, columns = count // 4, load_i64(x + gather.COLUMNS)
        ask = asking(block, columns, stride)
        for _ in range(passes):
            for j in range(part):
                a, b = matrix + j * stride, matrix + (part + j) * stride
                c, d = matrix + (2 * part + j) * stride, matrix + (3 * part + j) * stride
                later = (a + SOON * stride, b + SOON * stride, c + SOON * stride, d + SOON * stride)
                places = out + 4 * j, out + 4 * (part + j), out + 4 * (2 * part + j), out + 4 * (3 * part + j)
                store_sums(*places, *four((a, b, c, d), later, ask, columns, x))

    return loop


_DENSE = {
    weights: _without_list(getattr(gather, f"_four_{weights}"), INTEGERS if weights in ("q4", "q8") else FLOATS)
    for weights in FORMATS
}


@dataclass(frozen=True)
class Rows:
    """A matrix much larger than any cache."""

    weights: str
    columns: int
    row_bytes: int
    raw: np.ndarray  # (rows, row_bytes) uint8, begins on a page

    @property
    def count(self) -> int:
        return len(self.raw)


@contextmanager
def large_matrix(weights: str, columns: int, megabytes: int, mapped: bool) -> Iterator[Rows]:
    """Random rows in memory of our own (which NumPy asks large pages for), or in a mapped file, as large models are.

    The bytes of dot rows serve axpy as well: only the order of a row's columns differs.
    """
    tile = kernel_table.matrix(np.random.default_rng(1), _TILE, columns, weights, "dot")
    block = tile.raw[: _TILE * tile.stride].reshape(_TILE, tile.stride)[:, : tile.row_bytes].tobytes()
    blocks = megabytes * 10**6 // len(block)
    if mapped:
        with tempfile.TemporaryFile(dir=cache_dir()) as file:
            for _ in range(blocks):
                file.write(block)
            file.flush()
            raw: np.ndarray = np.memmap(file, np.uint8, "r", shape=(blocks * _TILE, tile.row_bytes))
            raw[:, 0].max()  # so that every page is there
            yield Rows(weights, columns, tile.row_bytes, raw)
        return
    memory = np.empty(blocks * len(block) + PAGE, np.uint8)
    memory = memory[-memory.ctypes.data % PAGE :][: blocks * len(block)]
    memory.reshape(blocks, -1)[:] = np.frombuffer(block, np.uint8)
    yield Rows(weights, columns, tile.row_bytes, memory.reshape(-1, tile.row_bytes))


def with_spare(listed: np.ndarray) -> np.ndarray:
    """The same list, int32, in memory that goes on with its last entry, for kernels to look ahead."""
    return np.pad(listed.astype(np.int32), (0, BLOCK), mode="edge")[: listed.size]


def random_lists(random: np.random.Generator, rows: int, density: float) -> list[np.ndarray]:
    """Sorted lists in which every row is with this probability; together about as long as there are rows."""
    lists = []
    for _ in range(round(1 / density)):
        gaps = random.geometric(density, int(rows * density * 1.1) + 100)
        chosen = np.cumsum(gaps) - 1
        lists.append(with_spare(chosen[chosen < rows]))
    return lists


class Bench:
    """The calls of both kernels on one matrix."""

    def __init__(self, rows: Rows, threads: int, pool: ThreadPoolExecutor) -> None:
        random = np.random.default_rng(2)
        self._rows, self._pool = rows, pool
        self._x: Activation = kernel_table.activation(random, 1, rows.columns, rows.weights)[0]
        self._factors = random.standard_normal(rows.count, np.float32)
        self._out = np.zeros((threads, rows.count), np.float32)
        self._y = np.zeros((threads, padded(rows.columns)), np.float32)
        self._scratch = np.zeros((threads, axpy_scratch(rows.columns)), np.float32)

    def seconds(self, kernel: str, lists: Sequence[np.ndarray], threads: int) -> float:
        """One pass over all lists, each split between the threads."""
        primitive: Primitive = getattr(_HOME[kernel], f"{kernel}_{self._rows.weights}")
        shares = zip(*(np.array_split(one, threads) for one in lists), strict=True)  # each thread's part of every list
        work = [[self._arguments(kernel, part, thread) for part in parts] for thread, parts in enumerate(shares)]
        drive = _calls_10 if kernel == "gather_dot" else _calls_9
        return self._timed([(drive, (primitive.address, np.array(calls, np.int64))) for calls in work])

    def gathered_seconds(self, lists: Sequence[np.ndarray], threads: int) -> float:
        """The same lists read and nothing done with them, the faster way."""
        rows = self._rows
        shares = zip(*(np.array_split(one, threads) for one in lists), strict=True)
        work = [gathered.described(parts) for parts in shares]
        place = (rows.raw.ctypes.data, rows.row_bytes, rows.row_bytes)
        return min(self._timed([(way, (*place, mine)) for mine in work]) for way in gathered.WAYS)

    def dense_seconds(self, count: int, passes: int) -> float:
        """The first rows, without a list."""
        rows, out = self._rows, self._out[0].ctypes.data
        x = self._x.descriptor.ctypes.data
        arguments = (rows.raw.ctypes.data, rows.row_bytes, count, x, out, passes)
        return self._timed([(_DENSE[rows.weights], arguments)])

    def _arguments(self, kernel: str, part: np.ndarray, thread: int) -> tuple[int, ...]:
        rows, size = self._rows, self._rows.row_bytes
        matrix, listed = (rows.raw.ctypes.data, size), part.ctypes.data
        if kernel == "gather_dot":
            lists = (listed, listed + 4 * SOON, size, part.size, 0, -(-part.size // 4))
            return (*matrix, *lists, self._x.descriptor.ctypes.data, self._out[thread].ctypes.data)
        y, scratch = self._y[thread].ctypes.data, self._scratch[thread].ctypes.data
        few = (listed, listed + 4 * BLOCK, part.size)
        return (*matrix, *few, self._factors.ctypes.data, y, padded(rows.columns), scratch)

    def _timed(self, jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> float:
        start = time.perf_counter()
        others = [self._pool.submit(function, *arguments) for function, arguments in jobs[1:]]
        function, arguments = jobs[0]
        function(*arguments)
        for other in others:
            other.result()
        return time.perf_counter() - start


def measure(
    rows: Rows, threads: Sequence[int], densities: Sequence[float], rounds: int, streams: machine.Streams
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All samples of one matrix, and what a full list costs; after a round that does not count."""
    random = np.random.default_rng(3)
    samples: dict[tuple[str, int, float], list[float]] = {}
    lists: dict[str, tuple[list[float], list[float]]] = {"memory": ([], []), "cache": ([], [])}
    with ThreadPoolExecutor() as pool:
        bench = Bench(rows, max(threads), pool)
        for number in range(rounds + 1):
            for density in densities:
                chosen = random_lists(random, rows.count, density)
                size = sum(one.size for one in chosen) * rows.row_bytes
                for kernel in KERNELS:
                    for count in threads:
                        seconds = bench.seconds(kernel, chosen, count)
                        if number:
                            samples.setdefault((kernel, count, density), []).append(size / seconds / 1e9)
                for count in threads:
                    seconds = bench.gathered_seconds(chosen, count)
                    if number:
                        samples.setdefault((GATHERED, count, density), []).append(size / seconds / 1e9)
            for place, few in (("memory", rows.count // 4 * 4), ("cache", 4 * max(1, _CACHED // 4 // rows.row_bytes))):
                passes = rows.count // few
                full = [with_spare(np.arange(few))] * passes
                pair = bench.seconds("gather_dot", full, 1), bench.dense_seconds(few, passes)
                if number:
                    for kept, seconds in zip(lists[place], pair, strict=True):
                        kept.append(seconds)
            if number:
                for count in threads:
                    streams.sample(count)
    about = {"weights": rows.weights, "columns": rows.columns, "row_bytes": rows.row_bytes}
    speeds = [
        about
        | {"kernel": kernel, "threads": count, "density": density, "gb_per_second": spread(values)}
        | {"of_gathered": pairwise(values, samples[GATHERED, count, density])}
        for (kernel, count, density), values in samples.items()
    ]
    return speeds, about | {place: pairwise(*pair) for place, pair in lists.items()}


def verify(weights: str, columns: int) -> None:
    """Both kernels against their twins, on a small matrix. Raises `AssertionError`."""
    random = np.random.default_rng(4)
    for kernel in KERNELS:
        chosen = np.flatnonzero(random.random(200) < 0.3)
        kernel_table.TABLE[f"{kernel}_{weights}"](random, rows=200, columns=columns, chosen=chosen).check()


def density_table(result: dict[str, Any]) -> str:
    """GB/s, the share of a streaming read and that of a gathered read, for every density, in Markdown."""
    bandwidth = {s["threads"]: s["gb_per_second"]["median"] for s in result["bandwidth"]}
    kinds: dict[tuple[Any, ...], dict[float, str]] = {}
    for r in result["speeds"]:
        speed = r["gb_per_second"]["median"]
        cell = f"{speed:.1f} ({speed / bandwidth[r['threads']]:.0%}"
        cell += ")" if r["kernel"] == GATHERED else f", {r['of_gathered']['median']:.0%})"
        kinds.setdefault((r["weights"], r["columns"], r["threads"], r["kernel"]), {})[r["density"]] = cell
    rows = [
        [f"{kernel} {weights}", columns, threads, *(cells[density] for density in result["densities"])]
        for (weights, columns, threads, kernel), cells in kinds.items()
    ]
    header = "GB/s (of a streaming read, of a gathered one)"
    return table([header, "columns", "threads", *(f"{d:g}" for d in result["densities"])], rows)


def list_table(result: dict[str, Any]) -> str:
    """The time of a full list over that of a loop without one, in Markdown."""
    rows = [[r["weights"], r["columns"], shown(r["memory"], 3), shown(r["cache"], 3)] for r in result["full_lists"]]
    return table(["a full list, times as long", "columns", "from memory", "from cache"], rows)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    watch, streams = machine.Watch(), machine.Streams((options.megabytes,))
    speeds: list[dict[str, Any]] = []
    full_lists: list[dict[str, Any]] = []
    for weights in options.weights:
        for columns in options.columns:
            verify(weights, columns)
            with large_matrix(weights, columns, options.megabytes, options.mapped) as rows:
                some, full = measure(rows, options.threads, options.density, options.rounds, streams)
            speeds += some
            full_lists.append(full)
    result = {
        "machine": machine.describe(),
        "megabytes": options.megabytes,
        "mapped": options.mapped,
        "rounds": options.rounds,
        "densities": options.density,
        "used_by_others": watch.others(),
        "bandwidth": streams.summary(),
        "speeds": speeds,
        "full_lists": full_lists,
    }
    print(density_table(result), list_table(result), bandwidth_line(result), sep="\n\n")
    results.finish(options.name, "kernels", result)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.kernels", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--columns", nargs="+", type=int, default=list(COLUMNS))
    parser.add_argument("--density", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, default_threads()}))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=1000, help="of a matrix (default: %(default)s)")
    parser.add_argument("--mapped", action="store_true", help="matrices in a mapped file instead of memory of our own")
    parser.add_argument("--name", default="kernels", help="of the result; - keeps none (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
