"""From starting a process to the first token, warm and cold, and the memory it takes: `python -m perf.start`.

Times are those of `fewfire generate` as a user runs it, from creating the process to the first byte of text: `warm`,
everything is in the cache; `no kernels`, the first start ever of this version; `no packed model`, nothing is there
but the download. Cold starts run in caches of their own, which are removed; the user's cache is not touched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fewfire
from fewfire.cache import cache_dir
from fewfire.sources import resolve
from fewfire.team import default_threads
from perf import machine, results
from perf.spread import shown, spread
from perf.table import table

PROMPT, TOKENS = "The capital of France is", 20
_MEMORY = """
import sys, fewfire
model = fewfire.load(sys.argv[1], weights=sys.argv[2], threads=int(sys.argv[3]))
session = model.session()
model.generate(sys.argv[4], max_tokens=int(sys.argv[5]), session=session)
for line in open("/proc/self/status"):
    if line.startswith(("VmRSS", "VmHWM", "RssAnon")):
        print(line.split()[0].strip(":"), line.split()[1])
"""


def first_byte(model: str, weights: str, threads: int, cache: Path | None = None) -> float:
    """Seconds from creating a process to the first byte that it says. Raises `SystemExit` if it fails."""
    options = ["--max-tokens", str(TOKENS), "--weights", weights, "--threads", str(threads)]
    command = [sys.executable, "-m", "fewfire_cli", "generate", model, PROMPT, *options]
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, env=_environment(cache))
        assert process.stdout
        byte = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        if process.wait() or not byte:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed: {said.read().decode(errors='replace')}")
    return seconds


def memory(model: str, weights: str, threads: int) -> dict[str, float]:
    """Megabytes resident after some tokens (mapped files included), at the peak, and what is not mapped from files."""
    command = [sys.executable, "-c", _MEMORY, model, weights, str(threads), PROMPT, str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment(None))
    kilobytes = {key: int(value) for key, value in (line.split() for line in done.stdout.splitlines())}
    names = {"resident": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon"}
    return {ours: round(kilobytes[theirs] * 1024 / 1e6, 1) for ours, theirs in names.items() if theirs in kilobytes}


@contextmanager
def cold_cache(keep: list[Path]) -> Iterator[Path]:
    """A cache for one start that has, of the user's, only some directories (as hard links)."""
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".perf-start-") as name:
        for path in keep:
            if path.is_relative_to(cache_dir()):
                shutil.copytree(path, Path(name) / path.relative_to(cache_dir()), copy_function=os.link)
        yield Path(name)


def measure(model: str, weights: str, threads: int, warm: int, cold: int) -> dict[str, Any]:
    """One format's numbers."""
    packed = fewfire.load(model, weights=weights, threads=1).path
    source = resolve(model)
    source = source if source.is_dir() else source.parent
    first_byte(model, weights, threads)  # so that kernels are compiled and files are in memory
    out: dict[str, Any] = {"weights": weights, "threads": threads}
    out["warm"] = spread([first_byte(model, weights, threads) for _ in range(warm)])
    for name, keep in (("no_kernels", [source, packed]), ("no_packed_model", [source])):
        seconds = []
        for _ in range(cold):
            with cold_cache(keep) as cache:
                seconds.append(first_byte(model, weights, threads, cache))
        out[name] = spread(seconds) if seconds else None
    megabytes = round(sum(file.stat().st_size for file in packed.iterdir()) / 1e6, 1)
    return out | {"packed_mb": megabytes, "memory_mb": memory(model, weights, threads)}


def start_table(result: dict[str, Any]) -> str:
    """Seconds and megabytes in Markdown."""
    header = ["", "warm, s", "no kernels, s", "no packed model, s", "packed, MB", "resident, MB", "at the peak, MB"]
    rows = [
        [
            row["weights"],
            *(shown(row[name], 2) for name in ("warm", "no_kernels", "no_packed_model")),
            f"{row['packed_mb']:.0f}",
            f"{row['memory_mb']['resident']:.0f}",
            f"{row['memory_mb']['peak']:.0f}",
        ]
        for row in result["formats"]
    ]
    return table(header, rows)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    watch = machine.Watch()
    formats = [
        measure(options.model, weights, options.threads, options.warm, options.cold) for weights in options.weights
    ]
    result = {
        "machine": machine.describe(),
        "model": options.model,
        "runs": {"warm": options.warm, "cold": options.cold},
        "used_by_others": watch.others(),
        "formats": formats,
    }
    print(start_table(result))
    results.finish(options.name, "start", result)


def _environment(cache: Path | None) -> dict[str, str]:
    return dict(os.environ) | ({"FEWFIRE_CACHE": str(cache)} if cache else {})


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.start", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="as for fewfire.load (default: %(default)s)")
    parser.add_argument("--weights", nargs="+", default=["q4", "q8"])
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--warm", type=int, default=9, help="warm starts (default: %(default)s)")
    parser.add_argument("--cold", type=int, default=3, help="cold starts of each kind (default: %(default)s)")
    parser.add_argument("--name", default="start", help="of the result; - keeps none (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
