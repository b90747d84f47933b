"""The `fewfire` command itself: its subcommands, and how every error ends.

A mistake of the user (`click.UsageError`, `ValueError`) exits with 2, trouble at run time (`FewfireError`,
the system) with 1, Ctrl-C with 130; each says one line on stderr. Anything else is a bug and shows its
traceback. Subcommands import the engine inside their bodies, so that `--help` and completions come at once.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from fewfire_cli import terminal
from fewfire_cli.analyze import analyze
from fewfire_cli.bench import bench
from fewfire_cli.calibrate import calibrate
from fewfire_cli.chat import chat
from fewfire_cli.completions import completions
from fewfire_cli.eval import eval_command
from fewfire_cli.generate import generate
from fewfire_cli.info import info
from fewfire_cli.models import models
from fewfire_cli.pack import pack
from fewfire_cli.train import train


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from fewfire import __version__

        click.echo(f"fewfire {__version__}")
        ctx.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version)
@terminal.color_option
def cli() -> None:
    """Runs language models on ordinary CPUs.

    MODEL is an alias (smollm2, gemma3, smollm2-relu), a Hugging Face directory or hub id, a .gguf file, or a packed
    model.

    \b
    Example:
      fewfire chat
    """


for command in (chat, generate, info, analyze, bench, calibrate, eval_command, pack, train, models, completions):
    cli.add_command(terminal.color_option(command))


def main(args: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits."""
    terminal.prepare_streams()
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    try:
        result = cli.main(args, prog_name="fewfire", standalone_mode=False)
        sys.stdout.flush()  # here, so that a broken pipe is met while it is caught
        return result if isinstance(result, int) else 0
    except click.Abort:  # what click makes of Ctrl-C
        return 130
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has had enough
        _silence_stdout()
        return 1
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _fail(error.format_message().rstrip(".") + where, 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 1)
    except ValueError as error:
        return _fail(str(error), 2)
    except MemoryError:
        return _fail("not enough memory: try a smaller model, a smaller --context or --weights q4", 1)
    except OSError as error:
        names = [os.fspath(n) for n in (error.filename, error.filename2) if isinstance(n, (str, os.PathLike))]
        return _fail(": ".join([*names[:1], error.strerror or str(error)]), 1)
    except Exception as error:
        from fewfire.errors import FewfireError

        if isinstance(error, FewfireError):
            return _fail(str(error), 1)
        raise


def _fail(message: Any, code: int) -> int:
    terminal.error(str(message))
    return code


def _silence_stdout() -> None:
    """Whatever is left in stdout's buffer would fail once more at exit; let it go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
