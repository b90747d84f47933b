"""`fewfire train`: makes a model that fires less."""

from __future__ import annotations

from pathlib import Path

import click

from fewfire_cli.progress import ProgressBar


@click.command()
@click.argument("method", type=click.Choice(["relufy"]))
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--text", type=click.Path(path_type=Path), multiple=True, required=True, help="Text to train on.")
@click.option("--heldout", type=click.Path(path_type=Path), help="Text to measure with.  [default: a part of --text]")
@click.option("--tokens", default=1_000_000, show_default=True, help="How many to train on.")
@click.option("--sparsity", default=0.8, show_default=True, help="Share of the neurons that are to be zero.")
@click.option("--rank", default=0, show_default=True, help="Of the updates; 0: all weights of the FFNs move.")
@click.option("--window", default=512, show_default=True, help="Tokens of a window.")
@click.option("--batch", default=2, show_default=True, help="Windows of a step.")
@click.option("--rate", type=float, help="Learning rate.  [default: 1e-4, or 1e-3 with a rank]")
@click.option("--layerwise", default=0.0, show_default=True, help="Weight of the layers' errors in the loss.")
@click.option("--uniform", is_flag=True, help="The same sparsity in all layers.")
@click.option("--seed", default=0, show_default=True, help="Of the order of the text.")
def train(method: str, model: str, out: Path, text: tuple[Path, ...], heldout: Path | None, **options: object) -> None:
    """Trains MODEL to fire less; the result is the directory OUT. The same command goes on after an interruption."""
    from fewfire.train.run import Options
    from fewfire.train.run import train as run

    with ProgressBar() as progress:
        run(model, out, text, Options(**options), heldout, progress)  # type: ignore[arg-type]
