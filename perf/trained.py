"""Models that were trained to fire less, beside the original: `python -m perf.trained --against MODEL --texts FILE...`.

`--models NAME=PATH...`: checkpoints out of `fewfire train`, aliases, and packed models, calibrated or not. On each text
they decode the same tokens as the original with nothing left out: perplexity, KL and agreement are those of
`fewfire.damage`, and the kernels count the neurons that are read. Then all of them, the original and `--peers` decode
in turn. `--curve NAME=PATH`, of a model with thresholds: the same with all its thresholds times a factor, which moves
the one cut that they come from.

The result is written after every model. With `--resume`, what it has of the same models, texts and engine stays; its
speeds, if they were also measured on this machine, and in the way that is asked for now.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewfire
from fewfire.adapter import open_adapter
from fewfire.checkpoint import fingerprint
from fewfire.config import THRESHOLDED
from fewfire.selectors import store
from fewfire.sources import adapter_of
from fewfire.team import default_threads
from perf import machine, results
from perf.judge import Judge
from perf.peers import Request
from perf.race import race
from perf.spread import rounded, shown
from perf.table import table

FACTORS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.15, 1.35, 1.6)
_SAME = ("digest", "weights", "window", "texts")  # of an earlier result that goes on

Result = dict[str, Any]

# What of an earlier result goes on only on the same machine, before it is measured.
_UNTIMED: Result = {"timing": {}, "speeds": [], "used_by_others": None}


def training(source: str) -> dict[str, float]:
    """How many tokens a model was trained on and the hours that took, as far as its log or its adapter says."""
    if (adapter := adapter_of(source)) is not None:
        about = open_adapter(adapter).about
        return {name: about[name] for name in ("tokens", "hours") if name in about}
    log = Path(source).expanduser() / "training" / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    steps = [entry for entry in entries if "loss" in entry]
    return {"tokens": steps[-1]["tokens"], "hours": rounded(steps[-1]["seconds"] / 3600)} if steps else {}


def scaled(model: fewfire.Model, factor: float) -> fewfire.Model:
    """The same model with all thresholds of its activations times a factor. Raises `ValueError` if it has none."""
    if model.config.hidden_act not in THRESHOLDED:
        raise ValueError(f"{model.packed.name} has no thresholds ({model.config.hidden_act}), so there is no curve")
    arrays = model.packed.arrays
    limits = (arrays["act_threshold"] * factor).astype(arrays["act_threshold"].dtype)
    return fewfire.Model(replace(model.packed, arrays=arrays | {"act_threshold": limits}), model.engine.threads)


def left_out(row: Result) -> float:
    """The share of the FFNs' neurons that added nothing for a token, zero or not: their down rows were not read.

    Up rows would not do: some selections read none by rows, and others read those of neurons that they then drop.
    """
    return 1.0 - float(row["rows_read"]["down"])


def rows_table(result: Result) -> str:
    """What training or a selection made of the models, in Markdown."""
    header = ["", "leaves out", "tokens", "hours", "neurons left out", "MB/token"]
    for text in result["texts"]:
        header += [f"perplexity, {text['label']}", "KL, nats", "agreement"]
    original = [result["model"], "dense", "", "", "", f"{result['megabytes_per_token']:.1f}"]
    for text in result["texts"]:
        original += [f"{text['perplexity']:.2f}", "", ""]
    return table(header, [original, *map(_cells, result["rows"])])


def _cells(row: Result) -> list[str]:
    tokens, hours = row.get("tokens"), row.get("hours")
    cells = [
        row["name"],
        row["method"],
        "" if tokens is None else f"{tokens:,}",
        "" if hours is None else f"{hours:.1f}",
    ]
    cells += [f"{left_out(row):.1%}", f"{row['megabytes_per_token']:.1f}"]
    for text in row["texts"]:
        cells += [f"{text['perplexity']:.2f}, {grown(text)}", f"{text['kl']:.3f}", f"{text['agreement']:.1%}"]
    return cells


def grown(text: Result) -> str:
    """`+1.2 % ± 0.1`, of the perplexity."""
    error = "" if text["error_percent"] is None else f" ± {text['error_percent']:.1f}"
    return f"{text['growth_percent']:+.1f} %{error}"


def speeds_table(result: Result) -> str:
    """Speeds of one interleaved run, in Markdown; nothing without one."""
    rows = [
        [s["name"], s["threads"], shown(s["tokens_per_second"]), shown(s["over_dense"], 2)]
        for s in sorted(result["speeds"], key=lambda s: s["threads"])
    ]
    return table(["", "threads", "decode, tokens/s", f"times {result['model']}"], rows) if rows else ""


def curve_table(result: Result) -> str:
    """The trade-off of one model, in Markdown; nothing without one."""
    header = ["thresholds times", "neurons left out", "MB/token"]
    header += [f"perplexity, {text['label']}" for text in result["texts"]]
    rows = [
        [f"{p['factor']:g}", f"{left_out(p):.1%}", f"{p['megabytes_per_token']:.1f}"]
        + [f"{text['perplexity']:.2f}, {grown(text)}" for text in p["texts"]]
        for p in result["curve"].get("points", [])
    ]
    return table(header, rows) if rows else ""


class Report:
    """The result as far as it has been measured, on disk after every part."""

    def __init__(self, name: str, judge: Judge, resume: bool) -> None:
        self._name, self._judge = name, judge
        model = judge.model
        self.result: Result = {
            "machine": machine.describe(),
            "model": judge.label,
            "digest": store.model_digest(model.packed),
            "weights": model.weights,
            "megabytes_per_token": rounded(model.packed.bytes_per_token() / 1e6),
            "window": judge.window,
            "texts": [text.about() for text in judge.texts],
            "rows": [],
            **_UNTIMED,
            "curve": {},
        }
        if resume:
            before = self._earlier()
            kept = ("rows", "curve", *(_UNTIMED if before.get("machine") == self.result["machine"] else ()))
            self.result |= {key: before[key] for key in kept if key in before}

    def _earlier(self) -> Result:
        """A result of that name which this one continues; empty if it is of something else, or of another engine."""
        try:
            before: Result = json.loads((results.RESULTS / f"{self._name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        same = all(before.get(key) == self.result[key] for key in _SAME)
        return before if same and _engine(before) == _engine(self.result) else {}

    def row(self, name: str, source: str) -> None:
        """Judges a model, unless that has been done. The speeds, which are of one run, go with a model that is new."""
        model = self._judge.open(source)
        key, rows = fingerprint(model.path), {row["name"]: row for row in self.result["rows"]}
        if name in rows and rows[name]["digest"] == key:
            return
        rows[name] = {"name": name, "digest": key, **training(source), **self._judge.row(model)}
        self.result |= {"rows": list(rows.values()), **_UNTIMED}
        self.keep()

    def speeds(
        self, models: Sequence[tuple[str, str]], threads: Sequence[int], peers: Sequence[str], rounds: int
    ) -> None:
        """Lets the models (name, source) decode in turn with the original and peers, unless that has been done so."""
        timing = {"threads": sorted(threads), "peers": list(peers), "rounds": rounds}
        there = {speed["name"] for speed in self.result["speeds"]}
        if self.result["timing"] == timing and there.issuperset(name for name, _ in models):
            return
        watch = machine.Watch()
        requests = [Request(self._judge.source, count, self._judge.model.context) for count in threads]
        speeds, absent = race(self._judge, models, peers, requests, rounds)
        self.result |= {"timing": timing, "speeds": speeds, "used_by_others": watch.others()}
        for name, why in absent.items():
            print(f"absent: {name}: {why}", file=sys.stderr)
        self.keep()

    def curve(self, name: str, source: str, factors: Sequence[float]) -> None:
        """Judges a model at each factor, unless that has been done."""
        model = self._judge.open(source)
        curve: Result = {"name": name, "digest": fingerprint(model.path), "points": []}
        if all(self.result["curve"].get(key) == curve[key] for key in ("name", "digest")):
            curve = self.result["curve"]
        points = {point["factor"]: point for point in curve["points"]}
        for factor in factors:
            if factor not in points:
                points[factor] = {"factor": factor, **self._judge.row(scaled(model, factor))}
                self.result["curve"] = curve | {"points": [points[each] for each in sorted(points)]}
                self.keep()

    def keep(self) -> None:
        """Writes it."""
        if self._name != "-":
            results.write(self._name, "trained", self.result)


def _engine(result: Result) -> tuple[str, str]:
    """What a result was decoded with: the version, and the kernels that it has for the CPU."""
    described = result["machine"]
    return described["versions"]["fewfire"], described["level"]


def named(text: str) -> tuple[str, str]:
    """The parts of NAME=PATH; the name of a path alone is that of the file, and of an alias itself."""
    name, _, source = text.rpartition("=")
    return name or Path(source).name, source


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    threads, models = options.threads, [named(each) for each in options.models]
    judge = Judge(options.against, options.weights, max(threads), options.texts, options.tokens)
    report = Report(options.name, judge, options.resume)
    for name, source in models:
        report.row(name, source)
    if options.rounds and models:
        report.speeds(models, threads, options.peers, options.rounds)
    if options.curve:
        report.curve(*named(options.curve), options.factors)
    result = report.result
    print("\n\n".join(filter(None, (rows_table(result), speeds_table(result), curve_table(result)))))
    results.finish(options.name, "trained", result)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.trained", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--against", default="smollm2", help="the original, as for fewfire.load (default: %(default)s)")
    parser.add_argument("--texts", nargs="+", required=True, metavar="FILE[@0.8:1.0]", help="files, or shares of them")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--curve", metavar="NAME=PATH", help="a model with thresholds")
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS), help="of the thresholds")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text, at most (default: %(default)s)")
    parser.add_argument("--weights", default="q4", help="the number format of all models (default: %(default)s)")
    parser.add_argument("--peers", nargs="*", default=["llama.cpp:Q4_0"], metavar="ENGINE:FORMAT")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, default_threads()}))
    parser.add_argument("--rounds", type=int, default=9, help="of the timing; 0: none (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the result of that name")
    parser.add_argument("--name", default="trained", help="of the result; - keeps none (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
