"""Generation: tokens in, text out, one piece at a time.

`stream` returns a `Stream`, an iterator of `Piece`s that computes a token whenever one is asked for. It
promises that the joined pieces are `completion.text`, that a stop string never shows even in part, that
what the session's cache holds is always what `session.tokens` says (so a stream may be dropped at any
point), and that a cached prefix of the prompt is not computed again. Knows nothing of how a model computes,
nor of printing.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from fewfire.chat import required
from fewfire.errors import ContextFullError
from fewfire.sampling import Sampler, Sampling
from fewfire.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from fewfire.model import Model
    from fewfire.session import Session

FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class Piece:
    """Text that became certain. Often one token's, but a token may show later, or together with others."""

    text: str  # may be empty: half a character, or the possible beginning of a stop string
    token_id: int | None  # the token computed for this piece; None when only held-back text was left


@dataclass(frozen=True)
class Stats:
    """What was computed and how long it took; time that the consumer of a stream takes is not counted."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # the first so many of the prompt were in the session's cache already
    prompt_seconds: float = 0.0
    tokens: int = 0  # generated, without the token that ends an answer
    steps: int = 0  # tokens fed one at a time; the first token comes out of the prompt and takes no step
    seconds: float = 0.0  # spent on the steps

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of reading the part of the prompt that was not cached."""
        fed = self.prompt_tokens - self.cached_tokens
        return fed / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed."""
        return self.steps / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Completion:
    """A generated text. `finish_reason`: "stop" (the model ended, or a stop string came), "length"
    (`max_tokens`), "context" (the model's context is full) or "cancelled" (the stream was not read to its
    end).
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats = field(default_factory=Stats)


def stream(
    model: Model,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    session: Session | None = None,
) -> Stream:
    """Continues `prompt`. Bad arguments and a prompt that does not fit raise here, before anything is
    computed.
    """
    return Stream(model, prompt_ids(model, prompt), max_tokens, sampling or Sampling(), stop, session)


def chat_stream(
    model: Model,
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int = 1024,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    session: Session | None = None,
) -> Stream:
    """Answers a conversation, in the form of the model's chat template; ends where the model ends its turn.

    With the same session for every turn, only what is new in the messages is computed.
    """
    ids = required(model.chat_template).encode(model.tokenizer, messages)
    return stream(model, ids, max_tokens=max_tokens, sampling=sampling, stop=stop, session=session)


def prompt_ids(model: Model, prompt: str | Sequence[int]) -> list[int]:
    """The tokens of a raw prompt, with the BOS token in front where the model wants one.

    Special tokens written out in a text count as what they name, as in transformers and llama.cpp: the
    caller of a raw completion writes the whole prompt. (Chat messages are encoded by the chat template,
    which does not do this.)
    """
    config = model.config
    if isinstance(prompt, str):
        check_unicode(prompt, "the prompt")
        ids = model.tokenizer.encode(prompt, parse_special=True)
        bos = config.bos_token_id
        if config.add_bos_token and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
    else:
        ids = [int(i) for i in prompt]
        for i in ids:
            if not 0 <= i < config.vocab_size:
                raise ValueError(f"the prompt has token id {i}, and the model has ids 0 to {config.vocab_size - 1}")
    if not ids:
        raise ValueError("the prompt is empty: give the model at least one word to continue")
    return ids


def check_unicode(text: str, what: str) -> None:
    """Raises `ValueError` where a text has lone surrogates, which Python makes of undecodable bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode at character {error.start}: pass UTF-8 text") from None


class Stream(Iterator[Piece]):
    """The iterator behind `stream`. `completion` has what came so far; after the end, the whole result."""

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str],
        session: Session | None,
    ) -> None:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"max_tokens must be a whole number, 1 or more, not {max_tokens!r}")
        if len(ids) > model.context:
            raise ContextFullError(
                f"the prompt has {len(ids)} tokens and the context holds {model.context}: "
                "shorten the prompt or load the model with a larger context"
            )
        if session is not None and session.model is not model:
            raise ValueError("the session belongs to another model: use one made by this model's session()")
        self._model = model
        self._ids = list(ids)
        self._max_tokens = max_tokens
        self._sampler = Sampler(sampling)
        self._filter = StopFilter(stop)
        self.session = session or model.session()
        self._decoder = StreamDecoder(model.tokenizer)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._finish: FinishReason | None = None
        self._cached = self._steps = 0
        self._prompt_seconds = self._seconds = 0.0
        self._pieces = self._run()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        piece = next(self._pieces)
        self._text.append(piece.text)
        return piece

    def close(self) -> None:
        """Ends the stream here; the session stays usable, and `completion` has what came until now."""
        self._pieces.close()

    def read(self) -> Completion:
        """Reads to the end."""
        for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """What came so far, "cancelled" unless the stream has ended by itself."""
        stats = Stats(
            prompt_tokens=len(self._ids),
            cached_tokens=self._cached,
            prompt_seconds=self._prompt_seconds,
            tokens=len(self._tokens),
            steps=self._steps,
            seconds=self._seconds,
        )
        return Completion("".join(self._text), list(self._tokens), self._finish or "cancelled", stats)

    def _run(self) -> Generator[Piece]:  # a generator: the loop below is the whole of generation
        session, eos = self.session, self._model.config.eos_token_ids
        logits = self._feed_prompt()
        while True:
            token = self._sampler.pick(logits, self._tokens)
            if token in eos:
                yield from self._end("stop", self._decoder.finish(), None)
                return
            self._tokens.append(token)
            text = self._decoder.push(token)
            if len(self._tokens) == self._max_tokens:
                yield from self._end("length", text + self._decoder.finish(), token)
                return
            if len(session.tokens) >= self._model.context:
                yield from self._end("context", text + self._decoder.finish(), token)
                return
            shown = self._filter.push(text)
            if self._filter.stopped:
                self._finish = "stop"
                yield Piece(shown, token)
                return
            yield Piece(shown, token)
            start = time.perf_counter()
            logits = session.feed([token])
            self._seconds += time.perf_counter() - start
            self._steps += 1

    def _feed_prompt(self) -> np.ndarray:
        """Logits after the prompt, computing only what the session does not hold yet (but at least one
        token).
        """
        session, ids = self.session, self._ids
        start = time.perf_counter()
        same = common_prefix(session.tokens, ids)
        self._cached = min(same, len(ids) - 1)
        session.rewind(self._cached)
        logits = session.feed(ids[self._cached :], prompt=True)
        self._prompt_seconds = time.perf_counter() - start
        return logits

    def _end(self, reason: FinishReason, text: str, token: int | None) -> Generator[Piece]:
        shown = self._filter.push(text)
        if self._filter.stopped:
            reason = "stop"
        else:
            shown += self._filter.finish()
        self._finish = reason
        if shown or token is not None:
            yield Piece(shown, token)


class StopFilter:
    """Passes a stream of text on up to the first stop string, however the text is cut into pieces.

    The first stop string to be complete counts (of several ending at the same character, the longest). Text
    that may yet turn out to be the beginning of one is held back.
    """

    def __init__(self, stop: str | Sequence[str]) -> None:
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        for s in stops:
            if not isinstance(s, str) or not s:
                raise ValueError(f"a stop string must be a text of at least one character, not {s!r}")
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now."""
        if self.stopped:
            return ""
        text = self._held + text
        ends = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, s) for s in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first items two sequences share."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
