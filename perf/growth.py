"""How the cost of a token grows with context, threads and model size: `python -m perf.growth --models MODEL@CONTEXT`.

Beside each point is its floor: the bytes that the token must read, over the streaming bandwidth measured in the same
rounds. A model is measured at all contexts up to the one behind its `@` (128 if it has none). Contexts are filled with
random tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewfire.engine import BATCH, KVCache
from fewfire.quantize import FORMATS
from fewfire.team import default_threads
from perf import machine, results
from perf.decode import bandwidth_line
from perf.peers import Fewfire, Request
from perf.spread import rounded, shown, spread
from perf.status import say
from perf.table import table

CONTEXTS = (128, 512, 2048, 4096, 8192)


@dataclass
class Point:
    """One model, with a number of threads, at a context."""

    label: str
    engine: Fewfire
    cache: KVCache
    context: int
    seconds: list[float] = field(default_factory=list)

    def decode(self, tokens: int) -> float:
        """Decodes up to the context's end; seconds per token. The cache holds what came before."""
        engine, token = self.engine.model.engine, 0
        logits = np.empty(engine.config.vocab_size, np.float32)
        start = time.perf_counter()
        for position in range(self.context - tokens, self.context):
            engine.decode(token, position, self.cache, logits)
            token = int(logits.argmax())
        return (time.perf_counter() - start) / tokens

    def summary(self, tokens: int, streams: machine.Streams) -> dict[str, Any]:
        """Cost and floor in milliseconds."""
        needed = self.engine.bytes_per_token(self.context - tokens // 2)
        bandwidth = streams.bandwidth(self.engine.threads, needed / 1e6)
        cost = spread([1000 * s for s in self.seconds])
        floor = needed / bandwidth / 1e6
        return {
            "model": self.label,
            "parameters": sum(math.prod(shape) for shape in self.engine.model.config.shapes().values()),
            "weights": self.engine.model.weights,
            "threads": self.engine.threads,
            "context": self.context,
            "milliseconds_per_token": cost,
            "megabytes_per_token": rounded(needed / 1e6),
            "floor_milliseconds": rounded(floor),
            "share_of_bandwidth": rounded(floor / cost["median"]),
        }


def points(
    models: Sequence[str], weights: Sequence[str], threads: Sequence[int], contexts: Sequence[int]
) -> list[Point]:
    """Loads everything and fills the caches."""
    found = []
    for name in models:
        source, _, longest = name.partition("@")
        wanted = [context for context in contexts if context <= int(longest or min(contexts))]
        for form in weights:
            cache: KVCache | None = None
            for count in sorted(threads, reverse=True):
                request = Request(source, count, max(wanted))
                label = request.label()
                engine = Fewfire(f"fewfire:{form}", form, request)
                engine.draw_tokens()
                if max(wanted) > engine.model.context:
                    raise ValueError(f"{label} has a context of {engine.model.context} tokens, not {max(wanted)}")
                cache = cache or filled(engine, max(wanted), label)
                found += [Point(label, engine, cache, context) for context in wanted]
    return found


def filled(contender: Fewfire, context: int, label: str) -> KVCache:
    """Keys and values of random tokens."""
    engine, vocab = contender.model.engine, contender.model.config.vocab_size
    cache, ids = engine.new_cache(context), np.random.default_rng(0).integers(0, vocab, context)
    logits = np.empty((1, vocab), np.float32)
    for start in range(0, context, BATCH):
        say(f"{label}: reading {start} of {context} tokens")
        engine.prefill(ids[start : start + BATCH].tolist(), start, cache, logits)
    return cache


def measure(found: list[Point], tokens: int, rounds: int, streams: machine.Streams) -> None:
    """Every point once in each round, after one that does not count."""
    for number in range(rounds + 1):
        for point in found if number % 2 else reversed(found):
            say(f"round {number} of {rounds}: {point.label}, {point.engine.threads} threads, context {point.context}")
            seconds = point.decode(tokens)
            if number:
                point.seconds.append(seconds)
        for threads in sorted({point.engine.threads for point in found}):
            streams.sample(threads)
    say("")


def growth_table(result: dict[str, Any]) -> str:
    """All points in Markdown."""
    header = ["", "weights", "threads", "context", "ms/token", "floor, ms", "MB/token", "of bandwidth"]
    rows = [
        [
            p["model"],
            p["weights"],
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
    found = points(options.models, options.weights, options.threads, options.contexts)
    measure(found, options.tokens, options.rounds, streams)
    result = {
        "machine": machine.describe(),
        "rounds": options.rounds,
        "tokens": options.tokens,
        "used_by_others": watch.others(),
        "bandwidth": streams.summary(),
        "points": [point.summary(options.tokens, streams) for point in found],
    }
    print(growth_table(result), bandwidth_line(result), sep="\n\n")
    results.finish(options.name, "growth", result)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.growth", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["smollm2@8192"], metavar="MODEL[@CONTEXT]")
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=["q4"])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, default_threads()}))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--tokens", type=int, default=16, help="to decode at each point (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stream", nargs="+", type=int, default=[100, 2000], metavar="MB", help="streaming reads")
    parser.add_argument("--name", default="growth", help="of the result; - keeps none (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.tokens >= min(options.contexts):
        parser.error(f"--tokens {options.tokens} do not fit a context of {min(options.contexts)}")
    return options


if __name__ == "__main__":
    main()
