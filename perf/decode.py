"""Decode and prefill speed of fewfire and its peers, interleaved: `python -m perf.decode`.

In each round every contender reads a prompt and then decodes; the order turns round from round to round, so that a
slow minute of the machine hits all alike. Streaming bandwidth is measured in the same rounds. Then each is started in a
process of its own, for the time to the first token and its memory (`start.py`). Results go to perf/results/NAME.json
and as tables to the terminal.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import fewfire
from fewfire.team import default_threads
from perf import machine, results, start
from perf.peers import Contender, Request, load_all
from perf.prompts import prose
from perf.spread import pairwise, rounded, shown, spread
from perf.status import say
from perf.table import table

USUAL = ("fewfire:q4", "llama.cpp:Q4_0", "fewfire:q8", "llama.cpp:Q8_0")
ALL = (*USUAL, "fewfire:f32", "transformers:f32", "transformers:bf16", "ctranslate2:int8")
_EQUAL_BITS = {"fewfire:q4": "llama.cpp:Q4_0", "fewfire:q8": "llama.cpp:Q8_0", "fewfire:f32": "transformers:f32"}


@dataclass
class Samples:
    """Seconds of each round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def measure(
    contenders: list[Contender], ids: list[int], tokens: int, rounds: int, streams: machine.Streams
) -> list[Samples]:
    """Runs the rounds, after one that does not count (it compiles, maps files and fills caches)."""
    samples = [Samples() for _ in contenders]
    for number in range(rounds + 1):
        order = range(len(contenders)) if number % 2 else reversed(range(len(contenders)))
        for i in order:
            say(f"round {number} of {rounds}: {contenders[i].name}, {contenders[i].threads} threads")
            machine.settle()
            prefill, decode = contenders[i].prefill(ids), contenders[i].decode(tokens)
            if number:
                samples[i].prefill.append(prefill)
                samples[i].decode.append(decode)
        machine.settle()
        for threads in sorted({c.threads for c in contenders}):
            streams.sample(threads)
    say("")
    return samples


def summary(
    contender: Contender, samples: Samples, prompt: int, tokens: int, streams: machine.Streams
) -> dict[str, Any]:
    """One contender's numbers."""
    needed = contender.bytes_per_token(prompt + tokens // 2)
    speed = spread([tokens / s for s in samples.decode])
    bandwidth = streams.bandwidth(contender.threads, needed / 1e6)
    return {
        "name": contender.name,
        "threads": contender.threads,
        "prefill_tokens_per_second": spread([prompt / s for s in samples.prefill]),
        "decode_tokens_per_second": speed,
        "milliseconds_per_token": rounded(1000 / speed["median"]),
        "megabytes_per_token": rounded(needed / 1e6),
        "share_of_bandwidth": rounded(needed * speed["median"] / 1e9 / bandwidth),
    } | contender.details


def ratios(contenders: list[Contender], samples: list[Samples]) -> list[dict[str, Any]]:
    """How many times as fast each fewfire is as each peer with as many threads."""
    out: list[dict[str, Any]] = []
    best = _best_prefill(contenders, samples)
    for ours, our in zip(contenders, samples, strict=True):
        for theirs, their in zip(contenders, samples, strict=True):
            if not ours.name.startswith("fewfire") or theirs.name.startswith("fewfire"):
                continue
            if ours.threads == theirs.threads:
                out.append(
                    {
                        "name": ours.name,
                        "peer": theirs.name,
                        "threads": ours.threads,
                        "equal_bits": _EQUAL_BITS.get(ours.name.removesuffix("-dense")) == theirs.name,
                        "best_prefill": (theirs.name, theirs.threads) in best,
                        "prefill": pairwise(their.prefill, our.prefill),
                        "decode": pairwise(their.decode, our.decode),
                    }
                )
    return out


def _best_prefill(contenders: list[Contender], samples: list[Samples]) -> set[tuple[str, int]]:
    """Names and threads of what reads a prompt fastest among an engine's formats, where there are several."""
    found: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for contender, sample in zip(contenders, samples, strict=True):
        key = contender.name.partition(":")[0], contender.threads
        found.setdefault(key, []).append((median(sample.prefill), contender.name))
    return {(min(formats)[1], threads) for (_, threads), formats in found.items() if len(formats) > 1}


def speed_table(result: dict[str, Any]) -> str:
    """Contenders and their speeds, in Markdown."""
    header = ["", "threads", "decode, tokens/s", "ms/token", "MB/token", "of bandwidth", "prefill, tokens/s"]
    rows = [
        [
            c["name"],
            c["threads"],
            shown(c["decode_tokens_per_second"]),
            f"{c['milliseconds_per_token']:.2f}",
            f"{c['megabytes_per_token']:.1f}",
            f"{c['share_of_bandwidth']:.0%}",
            shown(c["prefill_tokens_per_second"], 0),
        ]
        for c in result["contenders"]
    ]
    return table(header, rows)


def ratio_table(result: dict[str, Any], *, all_pairs: bool = True) -> str:
    """fewfire over its peers, in Markdown; without `all_pairs`, over llama.cpp only at equal bits and where that reads
    a prompt fastest."""
    rows = [
        [
            f"{r['name']} / {r['peer']}" + (" (its best prefill)" if r.get("best_prefill") else ""),
            r["threads"],
            shown(r["decode"], 2),
            shown(r["prefill"], 2),
        ]
        for r in result["ratios"]
        if all_pairs or r["equal_bits"] or r.get("best_prefill") or not r["peer"].startswith("llama.cpp")
    ]
    return table(["times as fast", "threads", "decode", "prefill"], rows)


def bandwidth_line(result: dict[str, Any]) -> str:
    """The streaming reads of the same run."""
    parts = [
        f"{s['gb_per_second']['median']:.1f} GB/s of {s['megabytes']} MB with {s['threads']}"
        for s in result["bandwidth"]
    ]
    return "Streaming reads: " + ", ".join(parts) + " threads."


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    context = options.prompt + options.tokens + 1
    requests = [Request(options.model, threads, context, options.gguf) for threads in options.threads]
    watch, tokenizer = machine.Watch(), fewfire.load(requests[0].loadable("q4"), threads=1).tokenizer
    names = [*(ALL if options.all else options.contenders), *options.also]
    contenders, absent = load_all(names, requests)
    for name, why in absent.items():
        print(f"absent: {name}: {why}", file=sys.stderr)
    streams = machine.Streams(tuple(options.stream))
    samples = measure(contenders, prose(tokenizer.encode, options.prompt), options.tokens, options.rounds, streams)
    present = list(dict.fromkeys(c.name for c in contenders))
    starts = start.measure(present, requests[-1], options.starts, options.cold)[0] if options.starts else []
    result = {
        "machine": machine.describe(),
        "model": requests[0].label(),
        "rounds": options.rounds,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "used_by_others": watch.others(),
        "bandwidth": streams.summary(),
        "contenders": [
            summary(c, s, options.prompt, options.tokens, streams) for c, s in zip(contenders, samples, strict=True)
        ],
        "ratios": ratios(contenders, samples),
        "starts": starts,
        "absent": absent,
    }
    print(speed_table(result), ratio_table(result), bandwidth_line(result), sep="\n\n")
    if starts:
        print(f"\n{start.start_table(starts)}")
    results.finish(options.name, "decode", result)


def _options(argv: list[str] | None) -> argparse.Namespace:
    cores = default_threads()
    parser = argparse.ArgumentParser(prog="python -m perf.decode", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="as for fewfire.load (default: %(default)s)")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp, if MODEL is not a GGUF file")
    parser.add_argument("--contenders", nargs="+", default=list(USUAL), metavar="ENGINE:FORMAT")
    parser.add_argument("--all", action="store_true", help=f"all of {', '.join(ALL)}")
    parser.add_argument("--also", nargs="+", default=[], metavar="ENGINE:FORMAT", help="besides the usual contenders")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, cores}))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=128, help="tokens to read (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--stream", nargs="+", type=int, default=[100, 2000], metavar="MB", help="streaming reads")
    parser.add_argument("--starts", type=int, default=3, help="warm starts of each; 0: none (default: %(default)s)")
    parser.add_argument("--cold", type=int, default=1, help="cold starts of each kind (default: %(default)s)")
    parser.add_argument("--name", default="decode", help="of the result; - keeps none (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
