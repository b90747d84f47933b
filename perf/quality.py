"""Perplexity of fewfire's formats and of llama.cpp's on the same windows: `python -m perf.quality TEXT`.

The last fifth of the text (`--part`) is cut into windows that do not overlap; each is read from an empty cache and
every token of it but the first is scored, from the logits that the engines give, with the same code for all.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fewfire
from fewfire.damage import perplexity_growth
from fewfire.evaluate import token_nll
from fewfire.team import default_threads
from fewfire.windows import cut_tokens
from perf import machine, results
from perf.peers import AbsentError, Contender, Request, load
from perf.spread import rounded
from perf.table import table
from perf.texts import part_of

USUAL = (
    "fewfire:f32",
    "fewfire:bf16",
    "fewfire:q8",
    "fewfire:q4",
    "llama.cpp:original",
    "llama.cpp:Q8_0",
    "llama.cpp:Q4_0",
)


def losses(contender: Contender, cut: Sequence[Sequence[int]], decode: bool = False) -> np.ndarray:
    """The sum of -log p over the scored tokens of each window, float64; `decode`: one token at a time where we can."""
    logits = getattr(contender, "decoded_logits", contender.logits) if decode else contender.logits
    out = []
    for number, window in enumerate(cut, start=1):
        if sys.stderr.isatty():
            print(f"\r\033[K{contender.name}: window {number} of {len(cut)}", end="", file=sys.stderr, flush=True)
        out.append(token_nll(logits(window[:-1]), list(window[1:])).sum())
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return np.array(out)


def summary(contender: Contender, loss: np.ndarray, cut: Sequence[Sequence[int]], seconds: float) -> dict[str, Any]:
    """One contender's numbers; `megabytes` are the weights that a token reads."""
    counts = np.array([len(window) - 1 for window in cut])
    return {
        "name": contender.name,
        "perplexity": rounded(math.exp(loss.sum() / counts.sum())),
        "megabytes": rounded(contender.bytes_per_token(0) / 1e6),
        "seconds": round(seconds, 1),
    } | contender.details


def excess(loss: np.ndarray, base: np.ndarray, cut: Sequence[Sequence[int]]) -> dict[str, float]:
    """How many per cent the perplexity is over another's, and that figure's standard error over the windows."""
    growth, error = perplexity_growth(loss - base, np.array([len(window) - 1 for window in cut]))
    return {"percent": rounded(100 * growth), "error": rounded(100 * error) if len(cut) > 1 else 0.0}


def quality_table(result: dict[str, Any]) -> str:
    """Perplexities in Markdown, with the distance from the first row's."""
    first = result["contenders"][0]["name"]
    rows = [
        [
            c["name"],
            f"{c['megabytes']:.1f}",
            f"{c['perplexity']:.3f}",
            f"{c['excess']['percent']:+.2f} % ± {c['excess']['error']:.2f}" if c["name"] != first else "",
        ]
        for c in result["contenders"]
    ]
    return table(["", "MB/token", "perplexity", f"over {first}"], rows)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    text = part_of(options.text.read_text(encoding="utf-8"), options.part)
    request = Request(options.model, options.threads, options.window, options.gguf)
    model = fewfire.load(options.model, threads=1)
    bos = model.config.bos_token_id if model.config.add_bos_token else None
    cut = cut_tokens(model.tokenizer.encode(text)[: options.limit], options.window, bos)
    if not cut:
        raise SystemExit("the text is too short: at least two tokens are needed")
    absent, rows, base = {}, [], None
    for name in options.contenders:
        try:
            contender = load(name, request)
        except AbsentError as error:
            absent[name] = str(error)
            print(f"absent: {name}: {error}", file=sys.stderr)
            continue
        began = time.perf_counter()
        loss = losses(contender, cut, options.decode)
        base = loss if base is None else base
        rows.append(summary(contender, loss, cut, time.perf_counter() - began) | {"excess": excess(loss, base, cut)})
        del contender
    result = {
        "machine": machine.describe(),
        "model": options.model,
        "text": options.text.name,
        "part": options.part,
        "window": options.window,
        "decoded": options.decode,
        "scored": sum(len(window) - 1 for window in cut),
        "contenders": rows,
        "absent": absent,
    }
    print(quality_table(result))
    print(f"\n{result['scored']} tokens in windows of {options.window}.")
    results.finish(options.name, "quality", result)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.quality", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--model", default="smollm2", help="as for fewfire.load (default: %(default)s)")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp, if MODEL is not a GGUF file")
    parser.add_argument("--contenders", nargs="+", default=list(USUAL), metavar="ENGINE:FORMAT")
    parser.add_argument("--part", default="0.8:1.0", help="share of the text's characters (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens read together (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="score only so many tokens")
    parser.add_argument("--decode", action="store_true", help="fewfire reads one token at a time, as in generation")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--name", default="quality", help="of the result; - keeps none (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
