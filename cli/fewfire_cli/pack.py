"""`fewfire pack`: a model in the engine's own layout, in a directory of the user's choice."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click

from fewfire_cli import options
from fewfire_cli.human import size
from fewfire_cli.progress import ProgressBar


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@options.weights_option
@click.option("--adapter", type=click.Path(path_type=Path), help="A file of what training changed, to be merged.")
@click.option("--force", is_flag=True, help="Replace OUT when it is a packed model.")
def pack(model: str, out: Path, weights: str, adapter: Path | None, force: bool) -> None:
    """Converts MODEL into a packed model, the directory OUT.

    The other commands do this by themselves and keep the result in the cache. A packed model of your own can
    be moved to another machine.

    \b
    Example:
      fewfire pack smollm2 my-smollm2 --weights q8
      fewfire chat ./my-smollm2
      fewfire pack smollm2 sparse --adapter adapter.safetensors
    """
    from fewfire import packed, sources
    from fewfire.pack import pack as write

    out = Path(os.path.abspath(out))  # "." and ".." have no name to put a temporary one next to
    if out.exists() and not force:
        raise ValueError(f"{out} exists: choose another directory or pass --force")
    if out.exists() and not packed.is_packed(out):
        raise ValueError(f"{out} exists and is no packed model: choose another directory")
    own = sources.adapter_of(model)
    if adapter and own:
        raise ValueError(f"{model} has an adapter already: pass --adapter with the model that it is made from")
    with ProgressBar() as progress:
        path = sources.resolve(model, progress)
        if packed.is_packed(path):
            raise ValueError(f"{path} is packed already: copy the directory, or pack what it was made from")
        target = out.with_name(f".{out.name}.{os.getpid()}") if out.exists() else out
        alias = model in (*sources.ALIASES, *sources.ADAPTED) and not adapter
        write(path, target, weights, progress, model if alias else None, adapter or own)
    if target != out:
        _swap(target, out)
    click.echo(f"{out}: {size(sum(f.stat().st_size for f in out.iterdir()))}")


def _swap(new: Path, old: Path) -> None:
    """Puts one directory into the place of another, which is gone only once the new one is there."""
    aside = old.with_name(f"{new.name}.old")
    try:
        os.replace(old, aside)
        os.replace(new, old)
    except OSError:
        if not old.exists():
            os.replace(aside, old)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(aside)
