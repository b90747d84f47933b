"""Decoding beside other busy processes, as on every laptop: `python -m perf.busy`.

Contenders decode with as many threads as there are cores, in turn, while 0, 1, 2, ... other processes compute all the
time. Reported: tokens/s, the share of the same round's undisturbed speed, and how fewfire compares under the same load.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fewfire.team import default_threads
from perf import machine, results
from perf.peers import Contender, Request, load_all
from perf.spread import pairwise, shown, spread
from perf.status import say
from perf.table import table

Samples = dict[tuple[str, int], list[float]]  # tokens/s of each round, by contender and busy processes
_PROMPT = 32  # tokens


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute all the time, on cores that the system chooses."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3 if count else 0.0)
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def measure(contenders: Sequence[Contender], loads: Sequence[int], rounds: int, tokens: int, seconds: float) -> Samples:
    """Runs the rounds, after one that does not count."""
    ids = np.random.default_rng(0).integers(0, 256, _PROMPT).tolist()  # ids that every vocabulary has
    samples: Samples = {(c.name, count): [] for c in contenders for count in loads}
    for number in range(rounds + 1):
        for count in loads:
            for contender in contenders if number % 2 else reversed(contenders):
                say(f"round {number} of {rounds}: {contender.name} beside {count} busy processes")
                contender.prefill(ids)
                machine.settle()
                with busy_processes(count if number else 0):
                    speed = _speed(contender, tokens, seconds)
                if number:
                    samples[contender.name, count].append(speed)
    say("")
    return samples


def _speed(contender: Contender, tokens: int, seconds: float) -> float:
    """Tokens/s over so many tokens, or fewer where those would take longer than that."""
    done, spent = 0, 0.0
    while done < tokens and spent < seconds:
        spent += contender.decode(1)
        done += 1
    return done / spent


def summary(samples: Samples) -> list[dict[str, Any]]:
    """Each contender under each load."""
    return [
        {
            "name": name,
            "busy": count,
            "tokens_per_second": spread(speeds),
            "of_undisturbed": pairwise(speeds, samples[name, 0]),
        }
        for (name, count), speeds in samples.items()
    ]


def ratios(samples: Samples, loads: Sequence[int]) -> list[dict[str, Any]]:
    """How many times as fast each fewfire is as each peer under the same load."""
    names = list(dict.fromkeys(name for name, _ in samples))
    return [
        {"name": ours, "peer": peer, "busy": count, "decode": pairwise(samples[ours, count], samples[peer, count])}
        for ours in names
        for peer in names
        for count in loads
        if ours.startswith("fewfire") and not peer.startswith("fewfire")
    ]


def busy_table(result: dict[str, Any]) -> str:
    """Speeds and what is left of them, in Markdown."""
    rows = [
        [r["name"], r["busy"], shown(r["tokens_per_second"]), shown(r["of_undisturbed"], 2)] for r in result["speeds"]
    ]
    return table([f"{result['threads']} threads", "busy processes", "decode, tokens/s", "of undisturbed"], rows)


def ratio_table(result: dict[str, Any]) -> str:
    """fewfire over its peers, in Markdown."""
    rows = [[f"{r['name']} / {r['peer']}", r["busy"], shown(r["decode"], 2)] for r in result["ratios"]]
    return table(["times as fast", "busy processes", "decode"], rows)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    loads = sorted({0, *options.busy})
    request = Request(options.model, options.threads, _PROMPT + options.tokens + 1, options.gguf)
    watch = machine.Watch()
    contenders, absent = load_all(options.contenders, [request])
    for name, why in absent.items():
        print(f"absent: {name}: {why}", file=sys.stderr)
    samples = measure(contenders, loads, options.rounds, options.tokens, options.seconds)
    result = {
        "machine": machine.describe(),
        "model": request.label(),
        "threads": options.threads,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "used_by_others": watch.others(),
        "speeds": summary(samples),
        "ratios": ratios(samples, loads),
        "absent": absent,
    }
    print(busy_table(result), ratio_table(result), sep="\n\n")
    results.finish(options.name, "busy", result)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.busy", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="as for fewfire.load (default: %(default)s)")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp, if MODEL is not a GGUF file")
    contenders = ["fewfire:q4", "llama.cpp:Q4_0"]
    parser.add_argument("--contenders", nargs="+", default=contenders, metavar="ENGINE:FORMAT")
    parser.add_argument("--threads", type=int, default=default_threads())
    busy = sorted({1, default_threads()})
    parser.add_argument("--busy", nargs="+", type=int, default=busy, help="processes beside; 0 is always measured too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="to decode (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="after which fewer will do (default: %(default)s)")
    parser.add_argument("--name", default="busy", help="of the result; - keeps none (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
