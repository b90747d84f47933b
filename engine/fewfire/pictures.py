"""Pictures of an analysis, as PNG: the only part of the engine that needs matplotlib (`pip install 'fewfire[plot]'`).

One colour scale runs through all of them: a layer has the same colour everywhere, from the first, dark, to the last,
bright. What would happen by chance is dashed and grey.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fewfire.analyze import MAGNITUDES, SHARES, SMALL, Analysis
from fewfire.errors import FewfireError
from fewfire.sparsity import random_union

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError:
    raise FewfireError("pictures need matplotlib: pip install 'fewfire[plot]'") from None

T = TypeVar("T")
_LAYERS = colormaps["viridis"]
_CHANCE: dict[str, Any] = {"color": "#8a8a8a", "linestyle": "--", "linewidth": 1}
COLORS = ("#0b6e99", "#c8553d", "#588157", "#b08900")  # apart for colour-blind eyes too
_SIZE = (5.2, 3.7)  # of one picture, in inches


def draw(analysis: Analysis, path: Path) -> list[Path]:
    """Draws into a file whose name ends in .png, all pictures on one page, or into a directory, each in its own file.

    Returns what was written. Raises `FewfireError` where matplotlib is missing, as the import of this module does.
    """
    pictures = _pictures(analysis)
    if path.suffix.lower() == ".png":
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = -(-len(pictures) // 2)
        page = Figure(figsize=(columns * _SIZE[0], 2 * _SIZE[1] + 0.5), dpi=110, layout="constrained")
        page.suptitle(_caption(analysis), fontsize=11)
        panels = list(page.subplots(2, columns).flat)
        for axes, picture in zip(panels, pictures.values(), strict=False):
            paint(axes, picture, analysis)
        for axes in panels[len(pictures) :]:
            axes.set_axis_off()
        page.savefig(path)
        return [path]
    path.mkdir(parents=True, exist_ok=True)
    written = []
    for name, picture in pictures.items():
        figure = Figure(figsize=_SIZE, dpi=150, layout="constrained")
        paint(figure.subplots(), picture, analysis)
        figure.supxlabel(_caption(analysis), fontsize=6, color="#666666")
        written.append(path / f"{name}.png")
        figure.savefig(written[-1])
    return written


def _pictures(analysis: Analysis) -> dict[str, Callable[[Axes, Analysis], None]]:
    """All pictures that can be drawn of an analysis, by their files' names."""
    pictures: dict[str, Callable[[Axes, Analysis], None]] = {
        "depth": _depth,
        "energy": _energy,
        "magnitudes": _magnitudes,
        "positions": _positions,
        "overlap": _overlap,
        "aggregated": _aggregated,
    }
    if analysis.layers[0].predictor:
        pictures["predictor"] = _predictor
    return pictures


def _caption(analysis: Analysis) -> str:
    return (
        f"{analysis.model}, {analysis.weights}: {len(analysis.layers)} layers of {analysis.neurons:,} neurons,"
        f" {analysis.tokens:,} tokens. Active: {analysis.meaning}"
    )


def paint(axes: Axes, picture: Callable[[Axes, T], None], content: T) -> None:
    """Draws a picture of something in the style of all."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    picture(axes, content)
    axes.title.set(fontsize=10, fontweight="bold")
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_fontsize(9)


def _depth(axes: Axes, analysis: Analysis) -> None:
    """How many neurons hold the energy, and how many hardly fire, layer by layer."""
    numbers = [layer.number for layer in analysis.layers]
    for color, place in zip(COLORS, reversed(range(len(SHARES))), strict=False):
        label = f"hold {SHARES[place]:.0%} of the energy"
        axes.plot(numbers, [layer.energy[place] for layer in analysis.layers], ".-", color=color, label=label)
    idle = [layer.zeros if analysis.exact else layer.small for layer in analysis.layers]
    label = "exactly zero" if analysis.exact else f"|h| under {SMALL:.0%} of the largest"
    axes.plot(numbers, idle, ":", color="#444444", label=label)
    _percent(axes, y="share of the neurons", top=1.22)
    _layer_axis(axes)
    axes.set_title("Few neurons hold the energy")
    _legend(axes)


def _energy(axes: Axes, analysis: Analysis) -> None:
    """Share of the energy over the share of the neurons, the largest first; one curve a layer."""
    ranks = np.linspace(0, 1, len(analysis.layers[0].energy_curve))
    for layer, color in _colored(analysis):
        axes.plot(ranks, layer.energy_curve, color=color, linewidth=1)
    axes.plot([0, 1], [0, 1], **_CHANCE)
    axes.annotate("if all fired alike", (0.62, 0.6), rotation=33, fontsize=7.5, color=_CHANCE["color"], va="top")
    _percent(axes, y="share of the energy, the sum of h²", top=1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlim=(0, 1), xlabel="share of the neurons, largest |h| first", title="Energy by rank")
    _layer_scale(axes, analysis)


def _magnitudes(axes: Axes, analysis: Analysis) -> None:
    """How large the activations are beside the largest of their token."""
    middles = 10 ** ((MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2)
    for layer, color in _colored(analysis):
        # The first bin also has all that is smaller, so it is no point of the curve.
        axes.plot(middles[1:], layer.magnitudes[1:], color=color, linewidth=1)
    axes.axvline(SMALL, **_CHANCE)
    axes.set_xscale("log")
    axes.set(xlim=(1e-5, 1), xlabel="|h|, relative to the token's largest in the layer")
    _percent(axes, y="share of the activations, per tenth of a decade")
    axes.set_title("How large activations are")
    _layer_scale(axes, analysis)


def _positions(axes: Axes, analysis: Analysis) -> None:
    """A map: share of active neurons, layer by position."""
    labels = list(analysis.layers[0].by_position)
    values = np.array([list(layer.by_position.values()) for layer in analysis.layers])
    image = axes.imshow(values, aspect="auto", origin="lower", cmap="magma", vmin=0, interpolation="nearest")
    axes.set_xticks(range(len(labels)), labels)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False)
    axes.set(xlabel="position in the window, tokens", ylabel="layer", title="Active neurons, by position")
    bar = axes.figure.colorbar(image, ax=axes, format=PercentFormatter(1, decimals=0), pad=0.02)
    bar.set_label("share of the neurons", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _overlap(axes: Axes, analysis: Analysis) -> None:
    """How many of a token's active neurons the token before had too."""
    numbers = [layer.number for layer in analysis.layers]
    kept, chance = ([getattr(layer, name) for layer in analysis.layers] for name in ("kept", "active"))
    axes.fill_between(numbers, chance, kept, color=COLORS[0], alpha=0.12, linewidth=0)
    axes.plot(numbers, kept, ".-", color=COLORS[0], label="measured")
    axes.plot(numbers, chance, **_CHANCE, label="by chance")
    _percent(axes, y="share of a token's active neurons", top=1.12)
    _layer_axis(axes)
    axes.set_title("Active for the token before, too")
    _legend(axes)


def _aggregated(axes: Axes, analysis: Analysis) -> None:
    """How many neurons several tokens in a row use together, beside what chance would give."""
    for layer, color in _colored(analysis):
        axes.plot(list(layer.aggregated), list(layer.aggregated.values()), color=color, linewidth=1)
    mean = analysis.mean()
    runs = list(mean.aggregated)
    axes.plot(runs, list(mean.aggregated.values()), ".-", color="black", label="mean over the layers")
    chance = [np.mean([random_union(layer.active, t) for layer in analysis.layers]) for t in runs]
    axes.plot(runs, chance, **_CHANCE, label="mean by chance, 1 - sᵗ")
    axes.set_xscale("log", base=2)
    axes.set_xticks(runs, [str(t) for t in runs])
    axes.minorticks_off()
    _percent(axes, y="share of the neurons that any of them uses", top=1.12)
    axes.set(xlabel="t, tokens in a row", title="Neurons used by several tokens together")
    _legend(axes)
    _layer_scale(axes, analysis)


def _predictor(axes: Axes, analysis: Analysis) -> None:
    """How well the predictor guesses, and how much it reads, layer by layer."""
    numbers = [layer.number for layer in analysis.layers]
    for color, name in zip(COLORS, ("recall", "precision", "density"), strict=False):
        label = "read" if name == "density" else name
        axes.plot(
            numbers, [getattr(layer.predictor, name) for layer in analysis.layers], ".-", color=color, label=label
        )
    _percent(axes, y="share of the neurons", top=1.12)
    _layer_axis(axes)
    axes.set_title("How well they are predicted")
    axes.legend(fontsize=7.5, frameon=False, loc="upper left", ncols=3)


def _norm(analysis: Analysis) -> Normalize:
    return Normalize(0, max(1, len(analysis.layers) - 1) * 1.08)  # the last is not so bright that it vanishes on white


def _colored(analysis: Analysis) -> list[tuple[Any, Any]]:
    norm = _norm(analysis)
    return [(layer, _LAYERS(norm(layer.number))) for layer in analysis.layers]


def _layer_scale(axes: Axes, analysis: Analysis) -> None:
    scale = ScalarMappable(_norm(analysis), _LAYERS)
    bar = axes.figure.colorbar(scale, ax=axes, pad=0.02, ticks=MaxNLocator(6, integer=True))
    bar.ax.set_ylim(0, max(1, len(analysis.layers) - 1))
    bar.set_label("layer", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _layer_axis(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axes: Axes) -> None:
    """In two columns above 100 %, where no curve can be."""
    axes.legend(fontsize=7.5, frameon=False, loc="upper left", ncols=2)


def _percent(axes: Axes, y: str, top: float | None = None) -> None:
    """A vertical axis in per cent, up to `top` with ticks up to 100 %, or as far as it needs."""
    axes.set_ylim(0, top)
    axes.set_ylabel(y)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if top else None))
    if top:
        axes.set_yticks(np.linspace(0, 1, 6))
