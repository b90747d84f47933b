"""`fewfire eval`: how well a model predicts a text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fewfire_cli import options
from fewfire_cli.progress import ProgressBar
from fewfire_cli.text import read_text


def _share(_: click.Context, param: click.Parameter, value: str) -> tuple[float, float]:
    try:
        start, stop = (float(part) for part in value.split(":"))
    except ValueError:
        start, stop = 1.0, 0.0
    if not 0.0 <= start < stop <= 1.0:
        raise click.BadParameter(f"{value!r} is not a share like 0.8:1.0", param=param)
    return start, stop


@click.command("eval")
@click.argument("model")
@click.argument("file", type=click.Path(path_type=Path))
@options.model_options
@click.option("--window", default=512, show_default=True, help="Tokens that are read together.")
@click.option(
    "--part",
    default="0:1",
    callback=_share,
    metavar="FROM:TO",
    help="Share of the file's characters to score, such as 0.8:1.0.",
)
@click.option("--tokens", "limit", type=int, help="Score the first so many tokens only.")
@click.option("--json", "as_json", is_flag=True, help="The result as a JSON object.")
def eval_command(
    model: str,
    file: Path,
    window: int,
    part: tuple[float, float],
    limit: int | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Perplexity of MODEL on a text FILE (lower is better).

    Windows do not overlap, and all tokens but the first of each are scored.

    \b
    Example:
      fewfire eval smollm2 book.txt --weights q8 --part 0.8:1.0
    """
    from fewfire.evaluate import perplexity

    text = read_text(file)
    text = text[int(len(text) * part[0]) : int(len(text) * part[1])]
    loaded = options.load(model, **rest)
    with ProgressBar() as progress:
        result = perplexity(loaded, text, window=window, limit=limit, progress=progress)
    if as_json:
        click.echo(json.dumps({"model": model, "weights": loaded.weights, "window": window, **asdict(result)}))
    else:
        click.echo(
            f"perplexity {result.ppl:.4f} ({result.nll:.4f} nats per token) over {result.tokens} tokens"
            f" in {result.seconds:.1f} s, {result.tokens_per_second:.1f} tokens/s"
        )
