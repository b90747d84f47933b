"""The picture of `tradeoff.py`: what methods cost by density, and by the share of all weights that a token reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fewfire.pictures import COLORS, paint  # first: says what to do where matplotlib is missing
from fewfire.tradeoff import Point, Tradeoff

# isort: split
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

_LINEAR = 0.005  # growth up to here is drawn to scale, more by its logarithm
_TICKS = (-0.01, 0, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100)
_MOST = 150.0  # what grows by more leaves the picture


def draw(found: Tradeoff, path: Path) -> list[Path]:
    """Draws into a file whose name ends in .png, or into `methods.png` in a directory. Returns what was written.

    Raises `FewfireError` where matplotlib is missing, as the import of this module does.
    """
    file = path if path.suffix.lower() == ".png" else path / "methods.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(10.4, 4.4), dpi=110, layout="constrained")
    figure.suptitle(
        f"{found.model}, {found.weights}: {found.tokens:,} tokens that nothing was fitted to, against dense",
        fontsize=11,
    )
    left, right = figure.subplots(1, 2, sharey=True)
    paint(left, _by_density, found)
    paint(right, _by_bytes, found)
    figure.savefig(file)
    return [file]


def _by_density(axes: Axes, found: Tradeoff) -> None:
    """Growth of perplexity over what is read of what the method may leave out."""
    _curves(axes, found, lambda point: point.density)
    axes.set(
        ylabel="growth of perplexity", xlabel="density: read, of what the method may leave out", title="By density"
    )
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def _by_bytes(axes: Axes, found: Tradeoff) -> None:
    """The same over what is read of all weights, in which methods can be compared."""
    _curves(axes, found, lambda point: point.bytes_per_token / found.dense_bytes_per_token)
    axes.set(xlabel="read, of all weights of a token", title="By what a token reads")


def _curves(axes: Axes, found: Tradeoff, share: Callable[[Point], float]) -> None:
    """A line for each method, from nothing left out on, with standard errors."""
    for number, method in enumerate(dict.fromkeys(point.method for point in found.points)):
        points = sorted((point for point in found.points if point.method == method), key=share)
        at, growth = [*map(share, points), 1.0], [*(min(point.growth, _MOST) for point in points), 0.0]
        errors = [*(point.growth_error or 0.0 for point in points), 0.0]
        style = ("-", "--", ":")[number // len(COLORS) % 3]
        color = COLORS[number % len(COLORS)]
        axes.errorbar(at, growth, errors, fmt=f".{style}", color=color, elinewidth=1, capsize=2, label=method)
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+g} %" if value else "0 %"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlim(right=1.01)
    highest, lowest = (pick(p.growth for p in found.points) for pick in (max, min))
    axes.set_ylim(min(-_LINEAR / 2, 1.5 * lowest), min(max(2 * _LINEAR, 1.6 * highest), _MOST))
