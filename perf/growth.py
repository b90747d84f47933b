"""How the cost of a token grows with context, threads and model size: `python -m perf.growth --models MODEL@CONTEXT`.

Beside each point is its floor: the bytes that the token must read, over the streaming bandwidth measured in the same
rounds. A model is measured at all contexts up to the one behind its `@` (128 if it has none), with fewfire and
llama.cpp in turn. Contexts are filled with random tokens.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fewfire
from fewfire.team import default_threads
from perf import machine, results
from perf.decode import bandwidth_line
from perf.depth import Deep, load_deep
from perf.peers import AbsentError, Request
from perf.spread import rounded, shown, spread
from perf.status import say
from perf.table import table

USUAL = ("fewfire:q4", "llama.cpp:Q4_0")
CONTEXTS = (128, 512, 2048, 4096, 8192)


@dataclass
class Point:
    """One engine with a model, with a number of threads, at a context."""

    label: str
    parameters: int
    deep: Deep
    threads: int
    context: int
    seconds: list[float] = field(default_factory=list)  # per token

    def summary(self, tokens: int, streams: machine.Streams) -> dict[str, Any]:
        """Cost and floor in milliseconds."""
        needed = self.deep.engine.bytes_per_token(self.context - tokens // 2)
        bandwidth = streams.bandwidth(self.threads, needed / 1e6)
        cost = spread([1000 * s for s in self.seconds])
        floor = needed / bandwidth / 1e6
        return {
            "model": self.label,
            "parameters": self.parameters,
            "name": self.deep.engine.name,
            "threads": self.threads,
            "context": self.context,
            "milliseconds_per_token": cost,
            "megabytes_per_token": rounded(needed / 1e6),
            "floor_milliseconds": rounded(floor),
            "share_of_bandwidth": rounded(floor / cost["median"]),
        }


def points(
    models: Sequence[str], names: Sequence[str], threads: Sequence[int], contexts: Sequence[int]
) -> tuple[list[Point], dict[str, str]]:
    """Loads everything and lets it read its contexts; why some engines are absent."""
    found: list[Point] = []
    absent: dict[str, str] = {}
    for model in models:
        source, _, longest = model.partition("@")
        wanted = [context for context in contexts if context <= int(longest or min(contexts))]
        request = Request(source, max(threads), max(wanted))
        config = fewfire.load(request.loadable("q4"), threads=1).config
        parameters = sum(math.prod(shape) for shape in config.shapes().values())
        for name in names:
            try:
                deep = load_deep(name, request, sorted(threads))
            except AbsentError as error:
                absent[f"{name}, {request.label()}"] = str(error)
                continue
            found += [
                Point(request.label(), parameters, deep, count, context)
                for count in sorted(threads, reverse=True)
                for context in wanted
            ]
    return found, absent


def measure(found: list[Point], tokens: int, rounds: int, streams: machine.Streams) -> None:
    """Every point once in each round, after one that does not count."""
    for number in range(rounds + 1):
        for point in found if number % 2 else reversed(found):
            name = point.deep.engine.name
            say(f"round {number} of {rounds}: {point.label}, {name}, {point.threads} threads, context {point.context}")
            machine.settle()
            seconds = point.deep.decode(point.threads, point.context, tokens)
            if number:
                point.seconds.append(seconds)
        machine.settle()
        for threads in sorted({point.threads for point in found}):
            streams.sample(threads)
    say("")


def growth_table(result: dict[str, Any]) -> str:
    """All points in Markdown."""
    header = ["", "engine", "threads", "context", "ms/token", "floor, ms", "MB/token", "of bandwidth"]
    rows = [
        [
            p["model"],
            p["name"],
            p["threads"],
            p["context"],
            shown(p["milliseconds_per_token"], 2),
            f"{p['floor_milliseconds']:.2f}",
            f"{p['megabytes_per_token']:.1f}",
            f"{p['share_of_bandwidth']:.0%}",
        ]
        for p in result["points"]
    ]
    return table(header, rows)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    watch, streams = machine.Watch(), machine.Streams(tuple(options.stream))
    found, absent = points(options.models, options.contenders, options.threads, options.contexts)
    for name, why in absent.items():
        print(f"absent: {name}: {why}", file=sys.stderr)
    measure(found, options.tokens, options.rounds, streams)
    result = {
        "machine": machine.describe(),
        "rounds": options.rounds,
        "tokens": options.tokens,
        "used_by_others": watch.others(),
        "bandwidth": streams.summary(),
        "points": [point.summary(options.tokens, streams) for point in found],
        "absent": absent,
    }
    print(growth_table(result), bandwidth_line(result), sep="\n\n")
    results.finish(options.name, "growth", result)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.growth", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["smollm2@8192"], metavar="MODEL[@CONTEXT]")
    parser.add_argument("--contenders", nargs="+", default=list(USUAL), metavar="ENGINE:FORMAT")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, default_threads()}))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--tokens", type=int, default=16, help="to decode at each point (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stream", nargs="+", type=int, default=[100, 2000], metavar="MB", help="streaming reads")
    parser.add_argument("--name", default="growth", help="of the result; - keeps none (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.tokens + 1 >= min(options.contexts):
        parser.error(f"--tokens {options.tokens} do not fit a context of {min(options.contexts)}")
    return options


if __name__ == "__main__":
    main()
