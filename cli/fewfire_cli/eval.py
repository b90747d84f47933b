"""`fewfire eval`: how well a model predicts a text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fewfire_cli import options
from fewfire_cli.progress import ProgressBar
from fewfire_cli.text import read_text

if TYPE_CHECKING:
    from fewfire.evaluate import Comparison, Perplexity


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
@click.option("--decode", is_flag=True, help="Read one token at a time, as when answering.")
@click.option(
    "--against",
    type=click.Choice(["dense"]),
    help="What the neurons that are left out cost; reads one token at a time.",
)
@click.option("--json", "as_json", is_flag=True, help="The result as a JSON object.")
def eval_command(
    model: str,
    file: Path,
    window: int,
    part: tuple[float, float],
    limit: int | None,
    decode: bool,
    against: str | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Perplexity of MODEL on a text FILE (lower is better).

    Windows do not overlap, and all tokens but the first of each are scored. A window is read at once, with every
    neuron that the model was trained with, unless --decode or --against is there.

    \b
    Example:
      fewfire eval smollm2 book.txt --weights q8 --part 0.8:1.0
      fewfire eval smollm2 book.txt --against dense
    """
    from fewfire.evaluate import compare, perplexity

    if against and rest["dense"]:
        raise click.UsageError("--against dense of a --dense model compares it with itself")
    text = read_text(file)
    text = text[int(len(text) * part[0]) : int(len(text) * part[1])]
    loaded = options.load(model, **rest)
    dense = options.load(model, **rest | {"dense": True}) if against else None
    with ProgressBar() as progress:
        if dense:
            result: Perplexity | Comparison = compare(
                loaded, dense, text, window=window, limit=limit, progress=progress
            )
        else:
            result = perplexity(loaded, text, window=window, limit=limit, decode=decode, progress=progress)
    if as_json:
        about = {"model": model, "weights": loaded.weights, "window": window, "decoded": decode or bool(against)}
        values = {k: None if math.isnan(v) else v for k, v in asdict(result).items()}
        click.echo(json.dumps(about | values))
    else:
        click.echo(_sentences(result))


def _sentences(result: Perplexity | Comparison) -> str:
    from fewfire.evaluate import Perplexity

    if isinstance(result, Perplexity):
        return (
            f"perplexity {result.ppl:.4f} ({result.nll:.4f} nats per token) over {result.tokens} tokens"
            f" in {result.seconds:.1f} s, {result.tokens_per_second:.1f} tokens/s"
        )
    error = "" if math.isnan(result.growth_error) else f" ± {result.growth_error:.2%}"
    return (
        f"perplexity {result.ppl:.4f}, dense {result.dense_ppl:.4f}: {result.growth:+.2%}{error}\n"
        f"mean KL to dense {result.kl:.5f} nats, same likeliest token {result.agreement:.2%}\n"
        f"over {result.tokens} tokens, both decoded in {result.seconds:.1f} s"
    )
