"""`fewfire generate`: continue a text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from fewfire_cli import options, terminal
from fewfire_cli.stats import Reads, stats_dict, stats_line
from fewfire_cli.statusline import StatusLine
from fewfire_cli.text import read_stdin, read_text


@click.command()
@click.argument("model", default=options.DEFAULT_MODEL)
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the prompt from a file.")
@options.model_options
@options.sampling_options(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
@click.option("--max-tokens", default=256, show_default=True, help="Stop after so many tokens.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text (repeatable).")
@click.option("--stats", is_flag=True, help="Tokens per second and the share of the weights read, on stderr.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end instead of streamed text.")
def generate(
    model: str,
    prompt: str | None,
    file: Path | None,
    stats: bool,
    as_json: bool,
    stop: tuple[str, ...],
    **rest: Any,
) -> None:
    """Continues PROMPT, which comes from the argument, --file or standard input.

    The prompt is taken as it is, without a chat template (see `fewfire chat`).

    \b
    Example:
      fewfire generate smollm2 "Once upon a time" --max-tokens 50 --stats
      echo "Once upon a time" | fewfire generate --temperature 0.8 --seed 1
    """
    max_tokens, sampling = rest.pop("max_tokens"), options.take_sampling(rest)
    text = _prompt(model, prompt, file)
    loaded = options.load(model, **rest)
    stream, reads = loaded.stream(text, max_tokens=max_tokens, sampling=sampling, stop=stop), Reads(loaded)
    with StatusLine(stats) as status:
        for piece in reads.watch(stream, status):
            if not as_json:
                terminal.write(piece.text)
    result = stream.completion
    if as_json:
        data = {
            "text": result.text,
            "tokens": result.token_ids,
            "finish_reason": result.finish_reason,
            "stats": stats_dict(result.stats, reads),
        }
        click.echo(json.dumps(data, ensure_ascii=False))
    elif not result.text.endswith("\n"):
        click.echo()
    if stats:
        terminal.note(stats_line(result.stats, reads))


def _prompt(model: str, prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise click.UsageError("give the prompt or --file, not both")
    if prompt is not None:
        return prompt
    if file is not None:
        return read_text(file)
    if " " in model:
        raise click.UsageError(f"the model comes first: fewfire generate {options.DEFAULT_MODEL} {model!r}")
    if terminal.is_terminal(sys.stdin):
        raise click.UsageError("no prompt: give it after the model, with --file or on standard input")
    # An editor or echo ends the text with a newline that nobody meant to be part of the prompt.
    return read_stdin().removesuffix("\n")
