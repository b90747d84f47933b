"""`fewfire pack`: a model in the engine's own layout, in a directory of the user's choice."""

from __future__ import annotations

from pathlib import Path

import click

from fewfire_cli import options
from fewfire_cli.progress import ProgressBar


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@options.weights_option
@click.option("--force", is_flag=True, help="Replace OUT when it is a packed model.")
def pack(model: str, out: Path, weights: str, force: bool) -> None:
    """Converts MODEL into a packed model, the directory OUT.

    Other commands do this by themselves and keep the result in the cache; a packed model of your own can be
    moved to another machine.

    \b
    Example:
      fewfire pack smollm2 smollm2-q8 --weights q8
      fewfire chat ./smollm2-q8
    """
    raise NotImplementedError
