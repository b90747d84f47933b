"""`fewfire info`: what a model is made of."""

from __future__ import annotations

import click

from fewfire_cli import options


@click.command()
@click.argument("model", default=options.DEFAULT_MODEL)
@options.weights_option
@click.option("--json", "as_json", is_flag=True, help="The same as a JSON object.")
def info(model: str, weights: str, as_json: bool) -> None:
    """Architecture, number formats and sizes of MODEL.

    \b
    Example:
      fewfire info smollm2 --weights q8
    """
    raise NotImplementedError
