"""`fewfire train`: makes a model that fires less."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fewfire_cli import terminal
from fewfire_cli.progress import ProgressBar


@click.command()
@click.argument("method", type=click.Choice(["relufy", "topk", "lte", "plain"]))
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--text", type=click.Path(path_type=Path), multiple=True, required=True, help="Text to train on.")
@click.option("--heldout", type=click.Path(path_type=Path), help="Text to measure with.  [default: a part of --text]")
@click.option("--tokens", default=1_000_000, show_default=True, help="How many to train on.")
@click.option("--sparsity", type=float, help="Share of the neurons to be zero.  [default: 0.8, or what ReLU has]")
@click.option("--rank", default=0, show_default=True, help="Of the updates; 0: all weights of the FFNs move.")
@click.option("--down", is_flag=True, help="Of the matrices only down moves: gate and up stay as they are quantised.")
@click.option("--reconstruct", is_flag=True, help="relufy: down starts as what makes up best for what is left out.")
@click.option("--start", default="", metavar="ADAPTER", help="relufy: go on from what an earlier training has left.")
@click.option("--adapter", is_flag=True, help="Also write a full update as an adapter, in few bits.")
@click.option("--rate", type=float, help="Learning rate.  [default: 1e-4, or 1e-3 with a rank]")
@click.option("--window", default=512, show_default=True, help="Tokens of a window.")
@click.option("--batch", default=2, show_default=True, help="Windows of a step.")
@click.option("--bf16", is_flag=True, help="Matrix products in bfloat16: faster where the processor knows it.")
@click.option("--labels", default=0.0, show_default=True, help="Share of the text's own next tokens in the loss.")
@click.option("--layerwise", default=0.0, show_default=True, help="Weight of the layers' errors in the loss.")
@click.option(
    "--activation",
    type=click.Choice(["threshold", "centred", "relu", "shifted"]),
    help="relufy: the model's own where it is large, or far from where it idles; ReLU, or ReLU(x - b).  [default: "
    "centred, or threshold where a model cannot have that]",
)
@click.option("--stage", type=click.IntRange(1, 2), default=1, help="relufy: 2 for ReLU after the norms, too.")
@click.option("--shift", default=1.0, show_default=True, help="relufy: b of the shifted ReLU at the start.")
@click.option("--l1", default=0.0, show_default=True, help="relufy: factor of ProSparse's regularization at the end.")
@click.option("--uniform", is_flag=True, help="relufy: the same sparsity in all layers.")
@click.option("--efficiency", default=0.3, show_default=True, help="lte: weight of the loss that closes groups.")
@click.option("--separability", default=0.001, show_default=True, help="lte: weight of the loss that decides them.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png",
    help="Draw the curves. Needs fewfire[plot].",
)
@click.option("--seed", default=0, show_default=True, help="Of the order of the text.")
def train(
    method: str,
    model: str,
    out: Path,
    text: tuple[Path, ...],
    heldout: Path | None,
    plot: Path | None,
    **options: Any,
) -> None:
    """Trains MODEL to fire less; the result is the directory OUT.

    The model learns from itself: its predictions on the text are what it is to keep. If it is interrupted, the same
    command goes on where it stopped.

    \b
    Example:
      fewfire train relufy smollm2 sparser --text book.txt --sparsity 0.8
      fewfire pack sparser sparser-q4
    """
    if plot:
        from fewfire.train.curves import draw  # at once, so that a missing matplotlib is not told after hours of work
    from fewfire.train import export, log
    from fewfire.train.run import TRAINING, Options
    from fewfire.train.run import train as run

    try:
        with ProgressBar() as progress:
            run(method, model, out, text, Options(**options), heldout, progress)
    except KeyboardInterrupt:
        terminal.note("stopped; the same command goes on from here")
        raise
    entries = log.read(out / TRAINING / log.NAME)
    if plot:
        draw(entries, plot, f"{method} of {model}")
        terminal.note(f"wrote {plot}")
    if not (out / "config.json").exists():
        use = shlex.join(["fewfire", "pack", model, "PACKED", "--adapter", str(out / export.ADAPTER)])
        terminal.note(f"only an adapter was written, as no config.json can describe this model; to use it: {use}")
    click.echo(_summary(log.measurements(entries)))


def _summary(measured: Sequence[Mapping[str, Any]]) -> str:
    """What has become of the model, in a line."""
    first, last = measured[0], measured[-1]
    return (
        f"zeros {last['zeros']:.1%}, perplexity {last['perplexity']:.4g} on held-out text"
        f" ({last['perplexity'] / first['original'] - 1:+.1%} against the original's {first['original']:.4g})"
    )
