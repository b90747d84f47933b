"""All methods of leaving weights out on one model: `python -m perf.methods PACKED TEXT`.

Each method is calibrated on the default sample at each density, and judged on the last fifth of the text (`--part`),
token by token beside the dense model; its speed is measured with all its densities and dense decoding in turn. A
density is the share that the kernels read of what a method may leave out, with predictors and screens counted. Two
other ways to spread a density over the layers stand beside ours for some methods (`--baselines`).

The packed model's directory must be writable: what was fitted and tried is kept there for a week, as in `fewfire
calibrate`, for an engine of the same sources. The result is written after every method, and what it has of the same
model, engine and text is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fewfire
from fewfire import choosing, timing
from fewfire.calibrate import sample_text
from fewfire.calibration import Calibration
from fewfire.selectors import store
from fewfire.selectors.methods import parse
from fewfire.team import default_threads
from fewfire.tradeoff import Judge, Point
from fewfire.windows import windows
from perf import machine, results
from perf.spread import rounded
from perf.status import progress, say
from perf.table import table
from perf.texts import part_of

USUAL = (
    "down",
    "gate",
    "topk",
    "gate+down",
    "gate+reuse-8",
    "lowrank",
    "lowrank+gate",
    "router",
    "magnitude",
    "qkv",
    "o",
    "screen",
    "gate+screen",
    "gate+down+o+screen",
    "lowrank+gate+down+o+screen",
)
BASELINES = ("down", "gate", "gate+down", "magnitude")
SPREADS = ("spread", "greedy", "uniform")  # ours first
DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
_AT = 0.5  # the density of the baselines
_OFF = 0.03  # a density that a method misses by more is one that it cannot reach
_WINDOW = 512

Row = dict[str, Any]


class Bench:
    """A model, calibrated on the default sample and judged on another text."""

    def __init__(self, source: str, text: str, tokens: int, threads: int) -> None:
        self.model = fewfire.load(source, threads=threads, dense=True)
        self.work = Calibration(self.model, sample_text(), progress)
        cut = windows(self.model.tokenizer, self.model.config, text, min(_WINDOW, self.model.context), tokens)
        self.judge = Judge(self.work, cut)

    def rows(self, method: str, densities: Sequence[float], spread: str) -> list[Row]:
        """One method with one way to spread it, at several densities. Raises `ValueError` if it cannot be used."""
        points = self.judge.points(method, densities, getattr(choosing, spread)(self.work, method))
        selections = [self.work.as_loaded(method, point.densities) for point in points]
        base, *seconds = timing.side_by_side(self.model, [None, *selections], self.judge.windows[0], progress)
        say("")
        return [
            _row(point)
            | {"spread": spread, "tokens_per_second": rounded(1 / each), "dense_tokens_per_second": rounded(1 / base),
               "speedup": rounded(base / each)}
            for point, each in zip(points, seconds, strict=True)
        ]  # fmt: skip


def _row(point: Point) -> Row:
    """What a setting does to the predictions."""
    return {
        "method": point.method,
        "asked": point.asked,
        "density": rounded(point.density),
        "kept": {kind: rounded(sum(each) / len(each)) for kind, each in point.densities.items()},
        "growth_percent": rounded(100 * point.growth),
        "error_percent": None if point.growth_error is None else rounded(100 * point.growth_error),
        "kl": rounded(point.kl),
        "agreement": rounded(point.agreement),
        "megabytes_per_token": rounded(point.bytes_per_token / 1e6),
    } | ({} if point.missed is None else {"missed_bound": rounded(point.missed)})


def methods_table(result: dict[str, Any]) -> str:
    """Growth of the perplexity and times as fast as dense, methods from top to bottom, densities across."""
    rows = [row for row in result["rows"] if row["spread"] == SPREADS[0]]
    names = dict.fromkeys(row["method"] for row in rows)
    counts = Counter(row["asked"] for row in rows)
    asked = sorted((d for d, count in counts.items() if 2 * count > len(names)), reverse=True)  # not the baselines' one
    cells = {(row["method"], row["asked"]): _cell(row) for row in rows}
    return table(["", *(f"{d:g}" for d in asked)], [[n, *(cells.get((n, d), "") for d in asked)] for n in names])


def _cell(row: Row) -> str:
    cell = f"{row['growth_percent']:+.1f} %, {row['speedup']:.2f}x"
    return cell if abs(row["density"] - row["asked"]) <= _OFF else f"{cell} at {row['density']:.2f}"


def baselines_table(result: dict[str, Any]) -> str:
    """Ways to spread a density beside each other; nothing if only one was measured."""
    others = {(row["method"], row["asked"]) for row in result["rows"] if row["spread"] != SPREADS[0]}
    rows = [
        [row["method"], f"{row['asked']:g}", row["spread"], growth(row), f"{row['kl']:.4f}", f"{row['agreement']:.1%}"]
        for row in sorted(result["rows"], key=lambda row: (row["method"], SPREADS.index(row["spread"])))
        if (row["method"], row["asked"]) in others
    ]
    return table(["", "density", "spread", "perplexity", "KL, nats", "agreement"], rows) if rows else ""


def details_table(result: dict[str, Any]) -> str:
    """Everything about every setting."""
    header = ["", "density", "perplexity", "KL, nats", "agreement", "MB/token", "tokens/s", "dense", "times"]
    return table(
        header,
        [
            [
                row["method"] + ("" if row["spread"] == SPREADS[0] else f" ({row['spread']})"),
                f"{row['density']:.2f}",
                growth(row),
                f"{row['kl']:.4f}",
                f"{row['agreement']:.1%}",
                f"{row['megabytes_per_token']:.1f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['dense_tokens_per_second']:.1f}",
                f"{row['speedup']:.2f}",
            ]
            for row in result["rows"]
        ],
    )


def growth(row: Row) -> str:
    """`+1.20 % ± 0.10`, of the perplexity."""
    error = "" if row["error_percent"] is None else f" ± {row['error_percent']:.2f}"
    return f"{row['growth_percent']:+.2f} %{error}"


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    text = part_of(options.text.read_text(encoding="utf-8"), options.part)
    bench = Bench(options.packed, text, options.tokens, options.threads)
    watch, model = machine.Watch(), bench.model
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "model": model.packed.name,
        "digest": store.model_digest(model.packed),
        "weights": model.weights,
        "threads": model.threads,
        "text": options.text.name,
        "part": options.part,
        "scored": bench.judge.tokens,
        "dense": {"perplexity": rounded(bench.judge.perplexity),
                  "megabytes_per_token": rounded(model.packed.bytes_per_token() / 1e6)},
        "rows": [],
        "absent": {},
    }  # fmt: skip
    before = _earlier(options.name, result)
    result["rows"], others = before.get("rows", []), before.get("used_by_others") or 0
    with contextlib.closing(bench.work.notebook):
        for method in options.methods:
            for spread in SPREADS if method in options.baselines else SPREADS[:1]:
                densities = options.densities if spread == SPREADS[0] else [_AT]
                there = {row["asked"] for row in result["rows"] if (row["method"], row["spread"]) == (method, spread)}
                missing = [density for density in densities if density not in there]
                try:
                    parse(method)
                    result["rows"] += bench.rows(method, missing, spread) if missing else []
                except ValueError as error:  # does not apply to this model
                    result["absent"][method] = str(error)
                    print(f"absent: {method}: {error}", file=sys.stderr)
                    break
                result["used_by_others"] = max(others, watch.others() or 0)
                if missing and options.name != "-":
                    results.write(options.name, "methods", result)
    print(details_table(result))
    results.finish(options.name, "methods", result)


def _earlier(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """A result of that name which this one continues; empty if it is of something else, or of an unknown engine."""
    try:
        earlier: dict[str, Any] = json.loads((results.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = all(earlier.get(key) == result[key] for key in ("digest", "threads", "text", "part", "scored"))
    engine = result["machine"]["versions"]["fewfire"]
    known = not engine.endswith(("+", "unknown commit"))
    return earlier if same and known and earlier["machine"]["versions"]["fewfire"] == engine else {}


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.methods", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("packed", help="a packed model, which keeps the fits, or a model as for fewfire.load")
    parser.add_argument("text", type=Path, help="a text file to judge by")
    parser.add_argument("--part", default="0.8:1.0", help="share of the text's characters (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="to score, at most (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(USUAL))
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES), metavar="METHOD")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--name", default="methods", help="of the result; - keeps none (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
