"""Text to token ids and back, over the `tokenizers` library; also one id at a time, for streaming.

Promises: ordinary text never becomes a special token; with `parse_special` the ids equal those of the
library's own matching. What a `StreamDecoder` says adds up to `decode` of all ids, and is never half a
character. Safe to use from several threads. Knows nothing of chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from fewfire.errors import CheckpointError, one_line

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A tokenizer.json."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_padding()
        inner.no_truncation()
        # The library now takes special tokens in a text for plain text. Where they are meant, `find_special`
        # matches them: switching this flag back and forth would not be safe with threads.
        inner.encode_special_tokens = True
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        self._special = {token.content: (id_, token) for id_, token in added.items() if token.special}
        self._special_ids = frozenset(id_ for id_, _ in self._special.values())
        self._lengths = sorted({len(text) for text in self._special}, reverse=True)
        first = "".join(sorted({re.escape(text[0]) for text in self._special}))
        self._first = re.compile(f"[{first}]" if first else r"(?!)")
        byte_tokens = (inner.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._byte_ids = frozenset(id_ for id_ in byte_tokens if id_ is not None)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """From the contents of a tokenizer.json. Raises `CheckpointError` when they are not one."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"the tokenizer cannot be read ({one_line(error)}): fetch the model's tokenizer.json again"
            ) from error

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json. Raises `CheckpointError` when it is missing or not one."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"cannot read the tokenizer {path} ({error}): fetch the model's tokenizer.json again"
            ) from error
        return cls.from_json(text)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; a model's embedding may have more rows, for alignment."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """The id of one token's exact text, None when there is no such token."""
        return self._inner.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """A token's text as the vocabulary spells it, None outside of it."""
        return self._inner.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def is_special(self, token_id: int) -> bool:
        """Whether an id is a control token, which `decode` leaves out by default."""
        return token_id in self._special_ids

    def is_byte(self, token_id: int) -> bool:
        """Whether an id is a byte by itself ("<0x0A>"), of a vocabulary that falls back to bytes."""
        return token_id in self._byte_ids

    def find_special(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of each special token in a text: leftmost, then longest, as the library does it.

        Start and end take in the space that a token is declared to eat.
        """
        at = end = 0
        while match := self._first.search(text, at):
            start = match.start()
            found = self._special_at(text, start)
            if found is None:
                at = start + 1
                continue
            content, id_, token = found
            if token.lstrip:
                start = max(end, len(text[:start].rstrip()))
            end = match.start() + len(content)
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            yield start, end, id_
            at = end

    def _special_at(self, text: str, start: int) -> tuple[str, int, tokenizers.AddedToken] | None:
        for length in self._lengths:
            content = text[start : start + length]
            if content not in self._special:
                continue
            id_, token = self._special[content]
            around = text[max(start - 1, 0) : start], text[start + length : start + length + 1]
            if not (token.single_word and any(re.match(r"\w", character) for character in around)):
                return content, id_, token
        return None

    def defuse(self, text: str, mark: str) -> str:
        """The text with `mark` put inside everything in it that `find_special` would find.

        Also inside the beginning of one at the end of the text, which something after it might complete.
        `encode(..., drop=mark)` takes the marks out again.
        """
        longest = self._lengths[0] if self._lengths else 0
        visible = len(text.rstrip())  # templates strip messages
        pieces, end = [], 0
        for match in self._first.finditer(text):
            start = match.start()
            rest = text[start : min(start + longest, visible)]
            unfinished = start + longest > visible and any(known.startswith(rest) for known in self._special)
            if unfinished or self._special_at(text, start):
                pieces += [text[end : start + 1], mark]
                end = start + 1
        return "".join([*pieces, text[end:]])

    def encode(self, text: str, *, parse_special: bool = False, drop: str = "") -> list[int]:
        """Ids of a text. Special tokens in it count as such only with `parse_special`.

        `drop` is a character that is left out, but only after the special tokens have been found: it keeps
        what it stands in (see `defuse`) from being taken for one.
        """
        ids: list[int] = []
        end = 0
        for start, stop, id_ in self.find_special(text) if parse_special else ():
            ids += self._plain(text[end:start], end, drop)
            ids.append(id_)
            end = stop
        return ids + self._plain(text[end:], end, drop)

    def _plain(self, text: str, offset: int, drop: str) -> list[int]:
        """Ids of a stretch of text without special tokens that begins at `offset` of the whole."""
        if drop:
            text = text.replace(drop, "")
        if not text:
            return []
        inner = self._continuing if offset else self._inner
        try:
            return inner.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:  # TypeError: what the library makes of surrogates
            raise ValueError(
                "the text is not valid Unicode (it has a lone surrogate, as bytes that are not UTF-8 leave): "
                "decode it with errors='replace'"
            ) from error

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The tokenizer for text that goes on after a special token.

        Metaspace with prepend_scheme "first" puts a space before the first word of a text and nowhere else;
        what follows a special token, encoded by itself, must not get one. All other tokenizers treat every
        stretch of text alike.
        """
        description = json.loads(self._inner.to_str())
        steps = json.dumps(description["pre_tokenizer"])
        first, never = '"prepend_scheme": "first"', '"prepend_scheme": "never"'
        if first not in steps:
            return self._inner
        description["pre_tokenizer"] = json.loads(steps.replace(first, never))
        continuing = tokenizers.Tokenizer.from_str(json.dumps(description))
        continuing.encode_special_tokens = True
        return continuing

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids; invalid UTF-8 becomes U+FFFD, ids past the vocabulary nothing."""
        return self._inner.decode(list(ids), skip_special_tokens=skip_special)


class StreamDecoder:
    """The text of a growing list of ids, told as soon as it is certain.

    Decoding the last few ids together gives the same text as decoding all of them, but for its beginning (the
    space a vocabulary begins words with, a character begun before). So it keeps a short window of ids and how
    much of its text is told; each id costs the same, however many came before.
    """

    _WINDOW, _TAIL = 24, 8  # ids; a tail of 8 is more than any unfinished character or stripped space has

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._told = 0  # characters of the window's text

    def push(self, token_id: int) -> str:
        """Add an id; returns what became certain, often "" or more than this id's own text."""
        hidden = self._skip_special and self._tokenizer.is_special(token_id)
        if hidden or self._tokenizer.id_to_token(token_id) is None:
            return ""  # `decode` leaves it out, so what stands around it is one run
        self._window.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""  # one bad byte turns a whole run of byte tokens into U+FFFD: wait for its end
        text = self._decode()
        # U+FFFD at the end may be the first bytes of a character. Before the end it is there to stay.
        certain = len(text) - text.endswith(_REPLACEMENT)
        new = text[self._told : certain]
        self._told = max(self._told, certain)
        if len(self._window) >= self._WINDOW:
            held = len(text) - self._told
            self._window = self._window[-self._TAIL :]
            self._told = len(self._decode()) - held
        return new

    def finish(self) -> str:
        """The rest, when no more ids will come: an unfinished character is told as U+FFFD. Starts anew."""
        rest = self._decode()[self._told :]
        self._window, self._told = [], 0
        return rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special)
