"""`fewfire chat`: a conversation, typed or piped."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import click

from fewfire_cli import options, terminal
from fewfire_cli.conversation import Conversation
from fewfire_cli.stats import stats_line
from fewfire_cli.statusline import StatusLine
from fewfire_cli.text import stdin_lines


@click.command()
@click.argument("model", default=options.DEFAULT_MODEL)
@options.model_options
@click.option("--system", metavar="TEXT", help="Instructions that the model sees first.")
@options.sampling_options(temperature=0.3, top_k=40, top_p=0.95, min_p=0.05, repetition_penalty=1.1)
@click.option("--max-tokens", default=1024, show_default=True, help="Longest answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before this text (repeatable).")
@click.option("--stats", is_flag=True, help="Tokens per second and the share of the weights read, on stderr.")
def chat(model: str, system: str | None, max_tokens: int, stop: tuple[str, ...], stats: bool, **rest: Any) -> None:
    """Talks with MODEL. In the chat, /help lists the commands.

    Ctrl-C stops an answer, Ctrl-D ends the chat. Without a terminal, each line of standard input is a
    message and only the answers are printed.

    \b
    Example:
      fewfire chat
      echo "What is the capital of France?" | fewfire chat smollm2 --temperature 0
    """
    sampling = options.take_sampling(rest)

    def begin() -> Conversation:
        return Conversation(options.load(model, **rest), system, sampling=sampling, max_tokens=max_tokens, stop=stop)

    if terminal.is_terminal(sys.stdin):
        from fewfire_cli.interactive import Interactive

        Interactive(begin(), model, stats).run()
        return
    lines = (line for line in stdin_lines() if line.strip())
    first = next(lines, None)
    if first is None:
        raise click.UsageError("standard input is empty: write a message to it")
    conversation = begin()
    for line in itertools.chain([first], lines):
        answer(conversation, line, stats)


def answer(conversation: Conversation, text: str, stats: bool) -> str:
    """Prints the answer to one message as it comes, and keeps the turn even when Ctrl-C cuts it short.

    Returns why the answer ended.
    """
    stream = conversation.ask(text)
    try:
        with StatusLine(stats) as status:
            for piece in conversation.reads.watch(stream, status):
                terminal.write(piece.text)
    finally:
        conversation.keep(text, stream)
        if not stream.completion.text.endswith("\n"):
            click.echo()
    if stats:
        terminal.note(stats_line(stream.completion.stats, conversation.reads))
    return stream.completion.finish_reason
