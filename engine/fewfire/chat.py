"""Chat templates: messages to the prompt that a model was trained on, as text or as token ids.

A template is a program that came with the model, so it runs in jinja2's sandbox, with the helpers that
transformers gives it. Promises: in `encode`, what a message says never becomes a control token, so that a
user cannot end a turn or begin one as the system. Knows nothing of generation.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fewfire.errors import CheckpointError, one_line
from fewfire.tokenizer import Tokenizer

Message = Mapping[str, str]


class ChatTemplate:
    """A model's chat template, compiled. Raises `CheckpointError` when it is not valid jinja."""

    def __init__(self, template: str, bos: str = "", eos: str = "") -> None:
        self.source = template
        self._bos, self._eos = bos, eos
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is broken in line {error.lineno} ({one_line(error)}): {_REMEDY}"
            ) from error
        except Exception as error:  # RecursionError on absurd nesting, constants folded at compile time
            raise CheckpointError(f"the chat template cannot be compiled ({one_line(error)}): {_REMEDY}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt as text. Raises `ValueError` for messages that the template refuses."""
        return self._render(_checked(messages), add_generation_prompt)

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """The prompt as ids: special tokens of the template's own count, those in messages are plain text."""
        checked = _checked(messages)
        # A character that nobody could have guessed breaks up special tokens in the messages and is dropped
        # once the template's own have been found. The template may trim and split messages as it likes.
        mark = _unused_character(self.source, *(text for message in checked for text in message.values()))
        safe = [{key: tokenizer.defuse(text, mark) for key, text in message.items()} for message in checked]
        return tokenizer.encode(self._render(safe, add_generation_prompt), parse_special=True, drop=mark)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self._bos,
                eos_token=self._eos,
                tools=None,
                documents=None,
            )
        except _RefusedError as error:
            raise ValueError(f"the model's chat template refuses these messages: {one_line(error)}") from error
        except Exception as error:  # the template is a program: anything can go wrong in it
            raise CheckpointError(f"the chat template fails ({one_line(error)}): {_REMEDY}") from error


def required(template: ChatTemplate | None) -> ChatTemplate:
    """The template of a model that is to chat. Raises `CheckpointError` when it has none."""
    if template is None:
        raise CheckpointError(
            "this model has no chat template, so it is not made to chat: use generate, or a model that is"
        )
    return template


_REMEDY = "use generate, or fetch the model's files again"


class _RefusedError(Exception):
    """What a template says through raise_exception."""


def _checked(messages: Sequence[Message]) -> list[dict[str, str]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError('messages must be a list such as [{"role": "user", "content": "Hello"}]')
    if not messages:
        raise ValueError("no messages: a chat needs at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {i} must be a dict with role and content, not {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"message {i} has no {key!r}")
        for key, text in message.items():
            if not isinstance(text, str):
                raise ValueError(f"{key!r} of message {i} must be a str, not {type(text).__name__}")
    return [dict(message) for message in messages]


def _unused_character(*texts: str) -> str:
    """A random character of a private-use plane that is in none of the texts."""
    while True:
        character = chr(0xF0000 + secrets.randbelow(0xFFFE))
        if not any(character in text for text in texts):
            return character


class _Generation(Extension):
    """{% generation %} marks the assistant's words for training; here it is just its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, where jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
