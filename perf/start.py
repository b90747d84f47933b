"""From starting a process to the first token, warm and cold, and the memory it takes: `python -m perf.start`.

fewfire is timed as `fewfire generate`, as a user runs it, from creating the process to the first byte of text; its
peers as the least code that imports the library, loads the model and reads the same prompt's ids (`firsttoken.py`).
Warm: everything that is made once is there. Cold: fewfire without compiled kernels, the first start ever of this
version; and without a packed model, when nothing is there but the download. Peers have nothing to make at a first
start, and what they need converted beforehand (CTranslate2's model, a GGUF of another type, the directory that
transformers reads) does not count. In each round all start in turn. Cold starts run in caches of their own, which are
removed; the user's cache is not touched.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fewfire
from fewfire.cache import cache_dir
from fewfire.generate import prompt_ids
from fewfire.packed import is_packed
from fewfire.sources import resolve
from fewfire.team import default_threads
from perf import machine, results, synthetic
from perf.peers import AbsentError, Request
from perf.spread import Spread, shown, spread
from perf.status import say
from perf.table import table

PROMPT, TOKENS = "The capital of France is", 20
USUAL = ("fewfire:q4", "llama.cpp:Q4_0", "fewfire:q8", "llama.cpp:Q8_0", "transformers:f32", "ctranslate2:int8")
_COLD = ("no_kernels", "no_packed_model")


@dataclass
class Starter:
    """One engine that is started again and again."""

    name: str
    threads: int
    command: list[str]  # says the first token, and then the memory
    timed: list[str]  # what a user runs, where that is something else
    megabytes: float  # of the files it loads
    keep: dict[str, list[Path]] = field(default_factory=dict)  # of the user's cache, for each kind of cold start
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: list[dict[str, float]] = field(default_factory=list)

    def warm(self) -> None:
        """Starts it once, and once more for its memory if that isn't what is timed."""
        seconds, said = first_byte(self.timed)
        self.seconds.setdefault("warm", []).append(seconds)
        if self.timed is not self.command:
            _, said = first_byte(self.command)
        self.memory.append(json.loads(said.splitlines()[-1]))

    def cold(self, kind: str) -> None:
        """Starts it once without what it makes only once."""
        with cold_cache(self.keep[kind]) as cache:
            self.seconds.setdefault(kind, []).append(first_byte(self.timed, cache)[0])

    def summary(self) -> dict[str, Any]:
        """Its numbers; a kind of start that it does not know is None."""
        times: dict[str, Spread | None] = {
            kind: spread(self.seconds[kind]) if kind in self.seconds else None for kind in ("warm", *_COLD)
        }
        memory = {key: statistics.median(m[key] for m in self.memory) for key in self.memory[0]}
        return {"name": self.name, "threads": self.threads} | times | {"mb": self.megabytes, "memory_mb": memory}


def starter(name: str, request: Request, ids: Sequence[int]) -> Starter:
    """Prepares an engine. Raises `AbsentError` if it cannot take part."""
    engine, _, form = name.partition(":")
    keep: dict[str, list[Path]] = {}
    if form.endswith("-dense"):
        raise AbsentError("it starts as it does without -dense")
    path: str | Path = request.loadable(form)
    if engine == "fewfire":
        packed = fewfire.load(path, weights=form, threads=1).path  # with this, kernels are compiled as well
        source = resolve(path)
        keep["no_kernels"] = [packed, source if source.is_dir() else source.parent]
        if not is_packed(source):
            keep["no_packed_model"] = keep["no_kernels"][1:]
        files = packed
    elif engine == "llama.cpp":
        from perf.llamacpp import requantized

        files = path = requantized(request.gguf_path(), form)
    elif engine in ("transformers", "ctranslate2"):
        from perf import torchpeers

        files = path = (torchpeers.saved if engine == "transformers" else torchpeers.converted)(request.path(), form)
    else:
        raise ValueError(f"unknown engine {name!r}: use fewfire, llama.cpp, transformers or ctranslate2")
    numbers = [str(n) for n in (request.threads, TOKENS, *ids)]
    command = timed = [sys.executable, "-m", "perf.firsttoken", engine, str(path), form, *numbers]
    if engine == "fewfire" and not synthetic.is_made(request.source):  # random weights may say nothing that is text
        options = ["--max-tokens", str(TOKENS), "--weights", form, "--threads", str(request.threads)]
        timed = [sys.executable, "-m", "fewfire_cli", "generate", str(path), PROMPT, *options]
    return Starter(name, request.threads, command, timed, _megabytes(files), keep)


def _megabytes(path: Path) -> float:
    files = path.iterdir() if path.is_dir() else [path]
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


def first_byte(command: list[str], cache: Path | None = None) -> tuple[float, str]:
    """Seconds from creating a process to the first byte that it says, and all that it says.

    Raises `SystemExit` if it fails.
    """
    environment = dict(os.environ) | ({"FEWFIRE_CACHE": str(cache)} if cache else {})
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        assert process.stdout
        byte = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        said = byte + process.stdout.read()
        if process.wait() or not byte:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed: {errors.read().decode(errors='replace')}")
    return seconds, said.decode()


@contextmanager
def cold_cache(keep: list[Path]) -> Iterator[Path]:
    """A cache for one start that has, of the user's, only some directories (as hard links)."""
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".perf-start-") as name:
        for path in keep:
            if path.is_relative_to(cache_dir()):
                shutil.copytree(path, Path(name) / path.relative_to(cache_dir()), copy_function=os.link)
        yield Path(name)


def measure(
    names: Sequence[str], request: Request, warm: int, cold: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rounds of warm starts, after one that does not count, and of cold ones; why some engines are absent."""
    starters: list[Starter] = []
    absent: dict[str, str] = {}
    ids = prompt_ids(fewfire.load(request.loadable("q4"), threads=1), PROMPT)
    for name in names:
        try:
            starters.append(starter(name, request, ids))
        except AbsentError as error:
            absent[name] = str(error)
            print(f"absent: {name}: {error}", file=sys.stderr)
    for number in range(warm + 1):
        for each in starters if number % 2 else reversed(starters):
            say(f"warm start {number} of {warm}: {each.name}")
            if number:
                each.warm()
            else:
                first_byte(each.timed)
    for number in range(cold):
        for each in starters if number % 2 else reversed(starters):
            for kind in each.keep:
                say(f"cold start {number + 1} of {cold}: {each.name}")
                each.cold(kind)
    say("")
    return [each.summary() for each in starters], absent


def start_table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds and megabytes in Markdown."""
    header = ["", "warm, s", "no kernels, s", "no packed model, s", "files, MB", "resident, MB", "at the peak, MB"]
    cells = [
        [
            row["name"],
            *(shown(row[name], 2) for name in ("warm", *_COLD)),
            f"{row['mb']:.0f}",
            *(f"{row['memory_mb'][key]:.0f}" if key in row["memory_mb"] else "-" for key in ("resident", "peak")),
        ]
        for row in rows
    ]
    return table(header, cells)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    watch, request = machine.Watch(), Request(options.model, options.threads, 512, options.gguf)
    rows, absent = measure(options.contenders, request, options.warm, options.cold)
    result = {
        "machine": machine.describe(),
        "model": request.label(),
        "threads": options.threads,
        "runs": {"warm": options.warm, "cold": options.cold},
        "used_by_others": watch.others(),
        "contenders": rows,
        "absent": absent,
    }
    print(start_table(rows))
    results.finish(options.name, "start", result)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.start", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="as for fewfire.load (default: %(default)s)")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp, if MODEL is not a GGUF file")
    parser.add_argument("--contenders", nargs="+", default=list(USUAL), metavar="ENGINE:FORMAT")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--warm", type=int, default=9, help="warm starts (default: %(default)s)")
    parser.add_argument("--cold", type=int, default=3, help="cold starts of each kind (default: %(default)s)")
    parser.add_argument("--name", default="start", help="of the result; - keeps none (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
