"""`fewfire models`: what is in the cache."""

from __future__ import annotations

import json

import click

from fewfire_cli import terminal
from fewfire_cli.human import size


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="The list as JSON.")
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """Lists the models in the cache.

    A download stays as it came; next to it are the packed forms that were made of it. Both come back by
    themselves when they are needed after a removal.

    \b
    Example:
      fewfire models
      fewfire models remove smollm2:q8
    """
    if ctx.invoked_subcommand:
        return
    from fewfire.cache import cache_dir
    from fewfire.library import cached_sources

    entries = cached_sources()
    if as_json:
        keys = ("name", "kind", "bytes", "damaged")
        rows = [{key: getattr(e, key) for key in keys} | {"path": str(e.path)} for e in entries]
        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    width = max((len(e.name) for e in entries), default=0)
    for e in entries:
        click.echo(f"{e.name:{width}}  {e.kind:6}  {size(e.bytes):>8}{'  damaged: remove it' if e.damaged else ''}")
    total = size(sum(e.bytes for e in entries))
    click.echo(f"{total} in {cache_dir()}" if entries else f"no models in {cache_dir()}")


@models.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@terminal.color_option
def remove(names: tuple[str, ...]) -> None:
    """Removes models by the names that `fewfire models` shows.

    \b
    Example:
      fewfire models remove smollm2
    """
    from fewfire.library import remove

    for name in names:
        for entry in remove(name):
            click.echo(f"removed {entry.name} ({size(entry.bytes)})")
