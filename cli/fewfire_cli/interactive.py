"""The chat at a terminal: reading lines, the / commands, and what Ctrl-C and Ctrl-D do."""

from __future__ import annotations

from pathlib import Path

import click

from fewfire.errors import ContextFullError, FewfireError
from fewfire_cli import terminal
from fewfire_cli.chat import answer
from fewfire_cli.conversation import Conversation
from fewfire_cli.lineinput import LineInput
from fewfire_cli.stats import stats_line

COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "TEXT  set the system message (alone: show it)",
    "/save": "FILE  write the conversation as JSON",
    "/stats": "speed of the last answer, and what it read of the weights",
    "/help": "this list",
    "/exit": "end (also Ctrl-D)",
}
CUT_SHORT = {
    "length": "the answer reached --max-tokens",
    "context": "the context is full: /reset forgets the conversation",
}
MULTILINE = '"""'


class Interactive:
    """Reads messages and commands until the person has had enough."""

    def __init__(self, conversation: Conversation, name: str, stats: bool) -> None:
        self.conversation, self.name, self.stats = conversation, name, stats

    def run(self) -> None:
        """The loop. Ends on Ctrl-D and /exit; a turn that fails is reported, and the chat goes on."""
        model = self.conversation.model
        threads = f"{model.threads} thread{'s' if model.threads > 1 else ''}"
        terminal.note(f"{self.name}, {model.weights}, {threads}. /help lists commands.")
        with LineInput(COMMANDS) as lines:
            while True:
                try:
                    text = self._read(lines)
                except KeyboardInterrupt:
                    click.echo(err=True)  # drops the line being typed, as a shell does
                    continue
                except EOFError:
                    click.echo(err=True)
                    return
                if text in ("/exit", "/quit", "/bye"):
                    return
                try:
                    self._handle(text)
                except KeyboardInterrupt:
                    terminal.note("stopped")
                except ContextFullError as error:
                    terminal.error(f"{error}, or /reset")
                except (FewfireError, ValueError, OSError) as error:
                    terminal.error(str(error))

    def _read(self, lines: LineInput) -> str:
        text = lines.read(">>> ").strip()
        if not text.startswith(MULTILINE):
            return text
        text = text.removeprefix(MULTILINE)
        while not text.rstrip().endswith(MULTILINE):
            text += "\n" + lines.read("... ")
        return text.rstrip().removesuffix(MULTILINE).strip()

    def _handle(self, text: str) -> None:
        if text.startswith("/"):
            name, _, rest = text.partition(" ")
            self._command(name, rest.strip())
        elif text:
            reason = answer(self.conversation, text, self.stats)
            if reason in CUT_SHORT:
                terminal.note(CUT_SHORT[reason])

    def _command(self, name: str, rest: str) -> None:
        conversation = self.conversation
        if name == "/reset":
            conversation.reset()
            terminal.note("forgotten")
        elif name == "/system":
            if rest:
                conversation.system = rest
            terminal.note(f"system message: {conversation.system or 'none of your own'}")
        elif name == "/save":
            if not rest:
                raise ValueError("/save needs a file name")
            conversation.save(Path(rest).expanduser())
            terminal.note(f"saved {len(conversation.messages)} messages to {rest}")
        elif name == "/stats":
            stats = conversation.last_stats
            terminal.note(stats_line(stats, conversation.reads) if stats else "no answer yet")
        elif name == "/help":
            for command, what in COMMANDS.items():
                terminal.note(f"  {command:8} {what}")
            terminal.note(f"  {MULTILINE:8} begins and ends a message of several lines")
        else:
            raise ValueError(f"unknown command {name}: /help lists them")
