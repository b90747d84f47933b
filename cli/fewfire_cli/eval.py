"""`fewfire eval`: how well a model predicts a text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fewfire_cli import options, terminal
from fewfire_cli.human import size
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
    help="What it costs that something is left out; reads one token at a time.",
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

    Windows do not overlap, and all tokens but the first of each are scored. A window is read at once, as a prompt is,
    with every neuron that the model was trained with, unless --decode or --against is there: what a calibration leaves
    out shows only then.

    --against dense tells the growth of perplexity and the KL divergence of the next token's distribution from dense's,
    estimated from dense's 512 most probable tokens and 512 that stand for all others. After ± are standard errors over
    the windows.

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
    with ProgressBar() as progress:
        if against:
            result: Perplexity | Comparison = compare(loaded, text, window=window, limit=limit, progress=progress)
        else:
            result = perplexity(loaded, text, window=window, limit=limit, decode=decode, progress=progress)
    if not decode and not against and loaded.engine.method not in ("dense", "exact"):
        terminal.note(f"read with all weights: --decode scores {loaded.engine.method}, --against dense what it costs")
    if as_json:
        about = {"model": model, "weights": loaded.weights, "window": window, "decoded": decode or bool(against)}
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(result).items()}
        click.echo(json.dumps(about | values))
    else:
        click.echo(_sentences(result))


def _sentences(result: Perplexity | Comparison) -> str:
    from fewfire.evaluate import Perplexity

    if isinstance(result, Perplexity):
        how = f"decoded, {result.method}" if result.bytes_per_token else "read at once, with all weights"
        read = f", {size(result.bytes_per_token)} of weights a token" if result.bytes_per_token else ""
        return (
            f"perplexity {result.ppl:.4f} ({result.nll:.4f} nats per token) over {result.tokens} tokens"
            f" in {result.seconds:.1f} s, {result.tokens_per_second:.1f} tokens/s; {how}{read}"
        )
    return (
        f"perplexity {result.ppl:.4f}, dense {result.dense_ppl:.4f}:"
        f" {result.growth:+.2%}{_error(result.growth_error, '.2%')}\n"
        f"KL to dense: mean {result.kl:.5f}{_error(result.kl_error, '.5f')} nats, median {result.kl_median:.5f},"
        f" 99% {result.kl_99:.4f}, largest {result.kl_max:.3f}\n"
        f"same likeliest token {result.agreement:.2%}{_error(result.agreement_error, '.2%')},"
        f" over {result.tokens} tokens\n"
        f"{result.method}: {size(result.bytes_per_token)} of weights a token instead of"
        f" {size(result.dense_bytes_per_token)}, {result.tokens_per_second:.1f} tokens/s instead of"
        f" {result.dense_tokens_per_second:.1f}"
    )


def _error(error: float, form: str) -> str:
    """` ± 0.12%`, nothing where it cannot be told."""
    return f" ± {error:{form}}" if math.isfinite(error) else ""
