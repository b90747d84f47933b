"""`fewfire models`: what is in the cache."""

from __future__ import annotations

import click


@click.group(invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """Lists the models in the cache.

    \b
    Example:
      fewfire models
      fewfire models remove smollm2
    """
