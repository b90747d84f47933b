"""Pictures of the results, `perf/plots/NAME.png`: drawn by `python -m perf.report` where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from perf.trained import left_out

Result = dict[str, Any]

_COLORS = ("#0b6e99", "#c8553d", "#588157", "#8a5a9e", "#b08900", "#5c677d")  # apart for colour-blind eyes too
_DASHES = ("-", "-.", ":")  # "--" is what a floor has
_NOTHING = 0.1  # per cent of perplexity that cannot be told from none
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.dpi": 110,
}


def draw(measured: dict[str, Result], directory: Path) -> list[Path]:
    """Every picture of all results; pictures of results that are gone are removed."""
    directory.mkdir(exist_ok=True)
    written = []
    with plt.rc_context(_STYLE):
        for name, result in measured.items():
            for ending, picture in _PICTURES.get(result["kind"], {}).items():
                figure = picture(result)
                if figure is not None:
                    path = directory / f"{name}{ending}.png"
                    # Without the version of matplotlib, so that the same results give the same file.
                    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
                    plt.close(figure)
                    written.append(path)
    for path in set(directory.glob("*.png")) - set(written):
        path.unlink()
    return written


def _decode(result: Result) -> Figure:
    """Bars of tokens/s, one colour for each number of threads."""
    rows = [(c["name"], _threads(c["threads"]), c["decode_tokens_per_second"]) for c in result["contenders"]]
    return _bars(rows, f"decode, tokens/s ({result['model']})")


def _busy(result: Result) -> Figure:
    """Bars of tokens/s, one colour for each number of busy processes beside."""
    rows = [
        (r["name"], f"{r['busy']} busy process" + ("es" if r["busy"] != 1 else ""), r["tokens_per_second"])
        for r in result["speeds"]
    ]
    return _bars(rows, f"decode, tokens/s ({result['model']}, {_threads(result['threads'])})")


def _bars(rows: list[tuple[str, str, Result]], label: str) -> Figure:
    """Bars with their spread: names from top to bottom, one colour for each group."""
    names = list(dict.fromkeys(name for name, _, _ in rows))
    groups = list(dict.fromkeys(group for _, group, _ in rows))
    height = 0.8 / len(groups)
    figure, axes = plt.subplots(figsize=(6, 0.6 + 0.21 * len(names) * max(2, len(groups))))
    for number, group in enumerate(groups):
        chosen = [(name, speed) for name, its_group, speed in rows if its_group == group]
        medians = [s["median"] for _, s in chosen]
        reach = [[s["median"] - s["min"] for _, s in chosen], [s["max"] - s["median"] for _, s in chosen]]
        at = [names.index(name) + height * number for name, _ in chosen]
        bars = axes.barh(at, medians, height, color=_COLORS[number], label=group)
        axes.errorbar(medians, at, xerr=reach, fmt="none", ecolor="#333333", elinewidth=0.8)
        axes.bar_label(bars, [f"{m:.0f}" for m in medians], label_type="center", color="white", fontsize=7)
    axes.set_yticks([i + height * (len(groups) - 1) / 2 for i in range(len(names))], names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    return _with_legend(figure, axes)


def _context(result: Result) -> Figure | None:
    """Milliseconds per token over the context: a row of panels for each model, a column for each number of threads."""
    models = [m for m in _models(result) if len({p["context"] for p in _points(result, model=m)}) > 1]
    if not models:
        return None
    threads = sorted({p["threads"] for p in result["points"]})
    size = (3.4 * len(threads), 0.5 + 2.5 * len(models))
    figure, panels = plt.subplots(len(models), len(threads), figsize=size, sharey="row", squeeze=False)
    for row, model in zip(panels, models, strict=True):
        for axes, count in zip(row, threads, strict=True):
            points = _points(result, model=model, threads=count)
            _curves(axes, points, "context")
            axes.set_xscale("log", base=2)
            _ticks(axes.xaxis, {p["context"]: f"{p['context']:,}" for p in points})
            axes.set_title(f"{model.split(',')[0]}, {_threads(count)}", fontsize=8)
        row[0].set_ylim(bottom=0)  # of the whole row, so not before all curves are there
        row[0].set_ylabel("ms per token")
    for axes in panels[-1]:
        axes.set_xlabel("context, tokens")
    return _with_legend(figure, panels[0][0])


def _sizes(result: Result) -> Figure | None:
    """Milliseconds per token over the number of parameters, at the shortest context; a panel for each number of
    threads."""
    shortest = min(p["context"] for p in result["points"])
    found = sorted(_points(result, context=shortest), key=lambda p: p["parameters"])
    if len({p["parameters"] for p in found}) < 2:
        return None
    threads = sorted({p["threads"] for p in found})
    figure, panels = plt.subplots(1, len(threads), figsize=(3.4 * len(threads), 3.2), sharey=True, squeeze=False)
    for axes, count in zip(panels[0], threads, strict=True):
        points = [p for p in found if p["threads"] == count]
        _curves(axes, points, "parameters")
        axes.set_xscale("log")
        axes.set_yscale("log")
        _ticks(axes.xaxis, {p["parameters"]: f"{p['parameters'] / 1e9:.2g}" for p in points})
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("billions of parameters")
        axes.set_title(f"{_threads(count)}, context of {shortest} tokens", fontsize=8)
    panels[0][0].set_ylabel("ms per token")
    real = ", ".join(dict.fromkeys(p["model"] for p in found if "random weights" not in p["model"]))
    figure.text(0.5, -0.03, f"weights are random but for {real or 'none'}", ha="center", fontsize=7)
    return _with_legend(figure, panels[0][0])


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    """The figure with the legend of one of its panels above them all."""
    handles, labels = axes.get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=min(4, len(labels)))
    return figure


def _densities(result: Result) -> Figure:
    """The share of a streaming read over density; one panel for each kernel, one colour for each format."""
    bandwidth = {s["threads"]: s["gb_per_second"]["median"] for s in result["bandwidth"]}
    threads = max(bandwidth)
    chosen = [s for s in result["speeds"] if s["threads"] == threads]
    kernels, formats = (list(dict.fromkeys(s[key] for s in chosen)) for key in ("kernel", "weights"))
    columns = sorted({s["columns"] for s in chosen})[-2:]
    figure, panels = plt.subplots(1, len(kernels), figsize=(3.4 * len(kernels), 3), sharey=True, squeeze=False)
    for axes, kernel in zip(panels[0], kernels, strict=True):
        for color, weights in zip(_COLORS, formats, strict=False):
            for count, line in zip(reversed(columns), ("-", ":"), strict=False):
                curve = [s for s in chosen if (s["kernel"], s["weights"], s["columns"]) == (kernel, weights, count)]
                shares = [s["gb_per_second"]["median"] / bandwidth[threads] for s in curve]
                label = f"{weights}, {count} columns"
                axes.plot([s["density"] for s in curve], shares, line, marker=".", color=color, label=label)
        axes.set_xscale("log")
        _ticks(axes.xaxis, {d: f"{d:g}" for d in result["densities"]})
        axes.axhline(1, color="#333333", linewidth=0.8)
        axes.set_xlabel("density (share of rows listed)")
        axes.set_title(f"{kernel}, {_threads(threads)}", fontsize=8)
    panels[0][0].set_ylim(bottom=0)
    panels[0][0].set_ylabel("GB/s over a streaming read's")
    return _with_legend(figure, panels[0][0])


def _methods(result: Result) -> Figure:
    """What each method costs in perplexity at the speed that it reaches, a line over its densities."""
    rows = [row for row in result["rows"] if row["spread"] == "spread"]
    figure, axes = plt.subplots(figsize=(6, 4))
    for number, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        curve = sorted((row for row in rows if row["method"] == name), key=lambda row: -row["asked"])
        costs = [max(row["growth_percent"], _NOTHING) for row in curve]
        axes.plot([row["speedup"] for row in curve], costs, marker=".", label=name, **_look(number))
    axes.set_yscale("log")
    axes.set_ylim(_NOTHING, 100)
    _ticks(axes.yaxis, {cost: f"+{cost:g} %" for cost in (0.1, 0.3, 1, 3, 10, 30, 100)})
    axes.set_xlabel(f"times as fast as dense decoding ({result['model']}, {_threads(result['threads'])})")
    axes.set_ylabel("perplexity")
    return _with_legend(figure, axes)


def _tradeoff(result: Result) -> Figure | None:
    """How much perplexity grows with the neurons left out: a line for each text as thresholds move; other models."""
    points = result["curve"].get("points", [])
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(6, 4))
    for number, text in enumerate(result["texts"]):
        growth = [max(p["texts"][number]["growth_percent"], _NOTHING) for p in points]
        look = _look(number)
        axes.plot([left_out(p) for p in points], growth, marker=".", label=text["label"], **look)
        for row in (row for row in result["rows"] if row["name"] != result["curve"]["name"]):
            at = left_out(row), max(row["texts"][number]["growth_percent"], _NOTHING)
            axes.plot(*at, "x", color=look["color"])
            if number == 0:
                axes.annotate(row["name"], at, (4, -8), textcoords="offset points", fontsize=6)
    axes.set_yscale("log")
    _ticks(axes.yaxis, {cost: f"+{cost:g} %" for cost in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)})
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"neurons left out ({result['curve']['name']} with its thresholds moved; x: other models)")
    axes.set_ylabel("perplexity")
    return _with_legend(figure, axes)


_PICTURES: dict[str, dict[str, Callable[[Result], Figure | None]]] = {
    "decode": {"": _decode},
    "busy": {"": _busy},
    "growth": {"-context": _context, "-size": _sizes},
    "kernels": {"": _densities},
    "methods": {"-growth": _methods},
    "trained": {"-curve": _tradeoff},
}


def _curves(axes: Axes, points: list[Result], over: str) -> None:
    """Cost of each engine, the spread as a band, and dashed what its bytes would cost at the streaming bandwidth."""
    for number, name in enumerate(dict.fromkeys(p["name"] for p in points)):
        curve = [p for p in points if p["name"] == name]
        at = [p[over] for p in curve]
        low, middle, high = ([p["milliseconds_per_token"][k] for p in curve] for k in ("min", "median", "max"))
        look = _look(number)
        axes.plot(at, middle, marker="o", ms=3, label=name, **look)
        axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)
        floor = [p["floor_milliseconds"] for p in curve]
        axes.plot(at, floor, "--", color=look["color"], linewidth=1, label="its floor")


def _look(number: int) -> dict[str, Any]:
    """Of a line among others, up to eighteen: six colours, and the same in two more styles when there are no more."""
    return {"color": _COLORS[number % len(_COLORS)], "linestyle": _DASHES[number // len(_COLORS) % len(_DASHES)]}


def _ticks(axis: Axis, labels: dict[float, str]) -> None:
    """Ticks at what was measured, and nowhere else."""
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(list(labels), list(labels.values()))


def _models(result: Result) -> list[str]:
    return list(dict.fromkeys(p["model"] for p in result["points"]))


def _points(result: Result, **wanted: Any) -> list[Result]:
    return [p for p in result["points"] if all(p[key] == value for key, value in wanted.items())]


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count != 1 else "")
