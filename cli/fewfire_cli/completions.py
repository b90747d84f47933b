"""`fewfire completions`: the script that makes a shell complete fewfire's commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completions(ctx: click.Context, shell: str) -> None:
    """Prints the completion script for a shell.

    \b
    Example:
      echo 'eval "$(fewfire completions bash)"' >> ~/.bashrc
      echo 'eval "$(fewfire completions zsh)"' >> ~/.zshrc
      fewfire completions fish > ~/.config/fish/completions/fewfire.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # the three are click's own
    click.echo(kind(ctx.find_root().command, {}, "fewfire", "_FEWFIRE_COMPLETE").source())
