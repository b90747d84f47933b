"""A chat's state: who said what so far, and the session that has it cached."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewfire_cli.stats import Reads

if TYPE_CHECKING:
    from fewfire import Model
    from fewfire.generate import Stats, Stream


class Conversation:
    """Messages of one chat. A turn counts once its answer has begun: a failed one leaves no trace."""

    def __init__(self, model: Model, system: str | None, **options: Any) -> None:
        """`options` are those of `Model.chat_stream`: sampling, max_tokens, stop."""
        self.model, self.system = model, system
        self.messages: list[dict[str, str]] = []
        self.last_stats: Stats | None = None
        self.reads = Reads(model)  # of the last answer
        self._options = options
        self._session = model.session()

    def all_messages(self) -> list[dict[str, str]]:
        """The system message, where there is one, and the turns."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def ask(self, text: str) -> Stream:
        """Begins an answer; hand the stream to `keep` when it has ended or was stopped."""
        messages = [*self.all_messages(), {"role": "user", "content": text}]
        self.reads = Reads(self.model)
        return self.model.chat_stream(messages, session=self._session, **self._options)

    def keep(self, text: str, stream: Stream) -> None:
        """Takes a turn into the history."""
        stream.close()
        answer = stream.completion
        self.last_stats = answer.stats
        if answer.text:
            self.messages += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer.text},
            ]

    def reset(self) -> None:
        """Forgets every turn; the system message stays."""
        self.messages.clear()

    def save(self, path: Path) -> None:
        """Writes the messages as JSON, in the form that `Model.chat` takes. Never over another file."""
        if path.exists():
            raise ValueError(f"{path} exists: choose another name")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            text = json.dumps(self.all_messages(), indent=2, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
