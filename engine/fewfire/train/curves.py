"""The curves of a run as one PNG: loss, perplexity and sparsity over the tokens (`pip install 'fewfire[plot]'`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewfire.errors import FewfireError
from fewfire.train import log

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter
except ImportError:
    raise FewfireError("pictures need matplotlib: pip install 'fewfire[plot]'") from None

_COLORS = ("#0b6e99", "#c8553d", "#588157", "#b08900")
_ORIGINAL: dict[str, Any] = {"color": "#8a8a8a", "linestyle": "--", "linewidth": 1}
_PARTS = {"kl": "KL to the original", "text": "text", "layers": "layers' errors", "l1": "L1"}
_SMOOTH = 50  # steps that a loss is averaged over, at most


def draw(entries: log.Entries, path: Path, title: str) -> None:
    """Draws a log, see `log.py`. Importing this module raises `FewfireError` where matplotlib is missing."""
    steps, measured = log.steps(entries), log.measurements(entries)
    tokens = {0: 0} | {entry["step"]: entry["tokens"] for entry in steps}
    places = [tokens[entry["step"]] for entry in measured]
    figure = Figure(figsize=(14.4, 3.9), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    loss, perplexity, zeros = figure.subplots(1, 3)
    for axes in (loss, perplexity, zeros):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("tokens", fontsize=9)
    _losses(loss, steps)
    perplexity.plot(places, [entry["perplexity"] for entry in measured], ".-", color=_COLORS[0])
    perplexity.axhline(measured[0]["original"], **_ORIGINAL)
    perplexity.annotate("original", (0, measured[0]["original"]), fontsize=7.5, color=_ORIGINAL["color"], va="bottom")
    perplexity.set_title("Perplexity of the held-out text", fontsize=10, fontweight="bold")
    zeros.plot(places, [entry["zeros"] for entry in measured], ".-", color=_COLORS[2])
    zeros.fill_between(
        places,
        [min(entry["layers"]) for entry in measured],
        [max(entry["layers"]) for entry in measured],
        color=_COLORS[2],
        alpha=0.15,
        linewidth=0,
    )
    zeros.set_ylim(0, 1)
    zeros.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    zeros.set_title("Zeros of act(gate): mean, and all layers", fontsize=10, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _losses(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    """Each part of the loss, averaged over the steps around."""
    width = max(1, min(_SMOOTH, len(steps) // 20))
    for (name, label), color in zip(_PARTS.items(), _COLORS, strict=True):
        if not any(name in entry for entry in steps):
            continue
        runs = [steps[at : at + width] for at in range(0, len(steps), width)]
        values = [sum(entry[name] for entry in run) / len(run) for run in runs]
        axes.plot([run[-1]["tokens"] for run in runs], values, "-", color=color, linewidth=1.2, label=label)
    axes.set_yscale("log")
    axes.set_title("Loss, by its parts", fontsize=10, fontweight="bold")
    if steps:
        axes.legend(fontsize=7.5, frameon=False)
