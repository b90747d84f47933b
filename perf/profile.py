"""Where the time of a decoded token goes, part by part: `python -m perf.profile`.

The engine's own decode loop runs on one thread with probes in place of its primitives (`probes.py`), so data comes from
where it comes from when a model really decodes. Beside each part: the bytes that it must read, how fast they came, and
its floor, which is those bytes over the bandwidth of a streaming read in the same rounds. The same tokens are decoded
without probes too: the difference is what the probes cost. "the loop" is what no primitive does, and the choice of the
next token.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from fewfire.quantize import FORMATS
from perf import machine, results
from perf.decode import bandwidth_line
from perf.depth import DeepFewfire
from perf.peers import Request
from perf.probes import PARTS, Probes, matrices, now
from perf.spread import rounded, shown, spread
from perf.status import say
from perf.table import table

LOOP, TOKEN, PLAIN = "the loop", "token", "without probes"


def bytes_read(deep: DeepFewfire, positions: float) -> dict[str, float]:
    """The bytes that a token must read for each part, after so many positions; of a selection, the last token's."""
    model = deep.model
    c, arrays, record = model.config, model.packed.arrays, model.engine._model.record
    up, head = c.num_hidden_layers * c.intermediate_size * int(record["down"][0]), arrays.get("head", arrays["embed"])
    gates, ups, downs = model.engine.neurons_read().sum(axis=0) / (c.num_hidden_layers * c.intermediate_size)
    found: dict[str, float] = dict.fromkeys(("predictor", "screen", "bypass"), 0)
    for part, array in matrices(model):
        found[part] = found.get(part, 0) + array.nbytes
    return {part: size for part, size in found.items() if size} | {
        "gate": gates * arrays["gate"].nbytes,
        "up": ups * up,
        "down": downs * (arrays["updown"].nbytes - up),
        "attention": deep.engine.cached_bytes(positions),
        "head": model.engine._work.exact.sum() * head.shape[2] if found["screen"] else head.nbytes,
    }


def probed(deep: DeepFewfire, probes: Probes, context: int, tokens: int) -> dict[str, float]:
    """Seconds per token of every part, of the loop and of the whole, for the last tokens of a context."""
    deep.return_to(context - tokens - 1, 1)
    deep.step(context - tokens - 1)  # does not count
    with probes:
        begin, start = now(), time.perf_counter()
        for position in range(context - tokens, context):
            deep.step(position)
        ticks, seconds = now() - begin, time.perf_counter() - start
    met = zip(PARTS, probes.ticks.tolist(), strict=True)
    parts = {part: seconds / ticks * count / tokens for part, count in met if count}
    return parts | {LOOP: seconds / tokens - sum(parts.values()), TOKEN: seconds / tokens}


def measure(
    deep: DeepFewfire, context: int, tokens: int, rounds: int, streams: machine.Streams
) -> dict[str, list[float]]:
    """Seconds per token of each round, with probes and without; after a round that does not count."""
    probes = Probes(deep.model)
    samples: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}")
        found = probed(deep, probes, context, tokens) | {PLAIN: deep.decode(1, context, tokens)}
        if number:
            for part, seconds in found.items():
                samples.setdefault(part, []).append(seconds)
        streams.sample(1)
    say("")
    return samples


def summary(
    samples: dict[str, list[float]], needed: dict[str, float], streams: machine.Streams
) -> list[dict[str, Any]]:
    """All parts, in the order of a token."""
    needed = needed | {TOKEN: sum(needed.values()), PLAIN: sum(needed.values())}
    bandwidth = streams.bandwidth(1, needed[TOKEN] / 1e6)
    token = float(np.median(samples[TOKEN]))
    rows = []
    for part, seconds in samples.items():
        median, size = float(np.median(seconds)), needed.get(part)
        row = {"part": part, "milliseconds": spread([1000 * s for s in seconds]), "share": rounded(median / token)}
        if size and median:
            row |= {
                "megabytes": rounded(size / 1e6),
                "gb_per_second": rounded(size / median / 1e9),
                "floor_milliseconds": rounded(size / bandwidth / 1e6),
            }
        rows.append(row)
    return rows


def profile_table(result: dict[str, Any]) -> str:
    """Parts of a token in Markdown."""
    rows = []
    for r in result["parts"]:
        row = [r["part"], shown(r["milliseconds"], 2), f"{r['share']:.0%}", "", "", ""]
        if "megabytes" in r:
            row[3:] = f"{r['megabytes']:.1f}", f"{r['gb_per_second']:.1f}", f"{r['floor_milliseconds']:.2f}"
        rows.append(row)
    return table(["", "ms", "of the token", "MB", "GB/s", "floor, ms"], rows)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    watch, streams = machine.Watch(), machine.Streams(tuple(options.stream))
    request = Request(options.model, 1, options.context)
    deep = DeepFewfire(f"fewfire:{options.weights}", request, [1])
    samples = measure(deep, options.context, options.tokens, options.rounds, streams)
    needed = bytes_read(deep, options.context - options.tokens / 2)
    result = {
        "machine": machine.describe(),
        "model": request.label(),
        "weights": options.weights,
        "context": options.context,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "used_by_others": watch.others(),
        "bandwidth": streams.summary(),
        "parts": summary(samples, needed, streams),
    }
    print(profile_table(result), bandwidth_line(result), sep="\n\n")
    results.finish(options.name, "profile", result)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.profile", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="as for fewfire.load (default: %(default)s)")
    parser.add_argument("--weights", choices=FORMATS, default="q4")
    parser.add_argument("--context", type=int, default=192, help="tokens before the last (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="to decode at its end (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stream", nargs="+", type=int, default=[100, 2000], metavar="MB", help="streaming reads")
    parser.add_argument("--name", default="profile", help="of the result; - keeps none (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.tokens + 1 >= options.context:
        parser.error(f"--tokens {options.tokens} do not fit a context of {options.context}")
    return options


if __name__ == "__main__":
    main()
