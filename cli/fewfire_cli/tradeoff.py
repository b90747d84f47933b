"""What methods cost at several densities, for people: the table of `fewfire analyze --methods`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewfire_cli.human import size

if TYPE_CHECKING:
    from fewfire.tradeoff import Point, Tradeoff


def table(found: Tradeoff) -> str:
    """A line for each method and density."""
    heads = ["method", "density", "read", "perplexity", "KL, nats", "agreement", "of all weights"]
    rows = [heads, *(_cells(point, found.dense_bytes_per_token) for point in found.points)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([*_legend(found), "", *lines])


def _cells(point: Point, dense_bytes: int) -> list[str]:
    error = "" if point.growth_error is None else f" ± {point.growth_error:.2%}"
    return [
        point.method,
        f"{point.asked:g}",
        f"{point.density:.1%}",
        f"{point.growth:+.2%}{error}",
        f"{point.kl:.4f}",
        f"{point.agreement:.1%}",
        f"{point.bytes_per_token / dense_bytes:.1%}",
    ]


def _legend(found: Tradeoff) -> list[str]:
    return [
        f"{found.model}, {found.weights}: {found.tokens} tokens that nothing was fitted to, decoded one by one;"
        f" dense: perplexity {found.perplexity:.2f}, {size(found.dense_bytes_per_token)} a token",
        "read: share of the weights that a method may leave out, with its predictors and screens",
        "perplexity: its growth against dense    KL: of the next token from dense's, mean",
        "agreement: the likeliest next token is dense's",
    ]
