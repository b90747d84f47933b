"""Engines that have read a long text, and decode at the end of any part of it.

The text is read once; each measurement goes back to a position and decodes from there, so that many contexts cost one
prompt. Texts are random tokens, and so are those that are decoded: speed depends on neither.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from fewfire.engine import BATCH
from perf.peers import AbsentError, Fewfire, Request, Stepwise
from perf.status import say

if TYPE_CHECKING:
    from perf.llamacpp import LlamaCpp


class Deep(ABC):
    """An engine that has read `context` tokens, for several numbers of threads."""

    def __init__(self, engine: Stepwise, context: int) -> None:
        self.engine, self.context = engine, context

    def decode(self, threads: int, context: int, tokens: int) -> float:
        """Seconds per token of the last `tokens` of a context; one before them does not count."""
        position = context - tokens
        self.return_to(position - 1, threads)
        self.step(position - 1)
        start = time.perf_counter()
        for at in range(position, context):
            self.step(at)
        return (time.perf_counter() - start) / tokens

    @abstractmethod
    def return_to(self, position: int, threads: int) -> None:
        """Forgets what comes from a position on."""

    @abstractmethod
    def step(self, position: int) -> None:
        """Reads one token more, at `position`."""


class DeepFewfire(Deep):
    """Our engines, one for each number of threads, with one cache: a position decides what they see of it."""

    engine: Fewfire

    def __init__(self, name: str, request: Request, threads: list[int]) -> None:
        form = name.partition(":")[2]
        self._engines = {
            count: Fewfire(name, form, Request(request.source, count, request.context)) for count in threads
        }
        self._active = self._engines[max(threads)]
        super().__init__(self._active, request.context)
        self.model = model = self._active.model
        if request.context > model.context:
            raise ValueError(f"{request.label()} has a context of {model.context} tokens, not {request.context}")
        vocab = model.config.vocab_size
        self._token, self._logits = 0, np.empty((1, vocab), np.float32)
        self._cache = model.engine.new_cache(request.context)
        ids = np.random.default_rng(0).integers(0, vocab, request.context)
        for engine in self._engines.values():
            engine.draw_tokens()
        for start in range(0, request.context, BATCH):
            say(f"{request.label()}, {name}: reading {start} of {request.context} tokens")
            model.engine.prefill(ids[start : start + BATCH].tolist(), start, self._cache, self._logits)

    def return_to(self, position: int, threads: int) -> None:
        self._active = self._engines[threads]

    def step(self, position: int) -> None:
        logits = self._logits[0]
        self._active.model.engine.decode(self._token, position, self._cache, logits)
        self._token = self._active.pick(logits)


class DeepLlamaCpp(Deep):
    """llama.cpp, which goes back to a copy of its keys and values."""

    def __init__(self, name: str, request: Request, threads: list[int]) -> None:
        from perf.llamacpp import LlamaCpp

        most = Request(request.source, max(threads), request.context, request.gguf)
        self._engine: LlamaCpp = LlamaCpp(name, name.partition(":")[2], most)
        super().__init__(self._engine, request.context)
        self._engine.draw_tokens()
        self._token = 0
        say(f"{request.label()}, {name}: reading {request.context} tokens")
        self._engine.feed(np.random.default_rng(0).integers(0, self._engine.vocab, request.context).tolist())
        self._state = self._engine.remembered()

    def return_to(self, position: int, threads: int) -> None:
        self._engine.recall(self._state, position)
        self._engine.use(threads)

    def step(self, position: int) -> None:
        self._token = self._engine.pick(self._engine.feed([self._token]))


def load_deep(name: str, request: Request, threads: list[int]) -> Deep:
    """An engine by its name, having read as many tokens as are to be held. Raises `AbsentError`, `ValueError`."""
    engine = name.partition(":")[0]
    if engine == "fewfire":
        return DeepFewfire(name, request, threads)
    if engine == "llama.cpp":
        return DeepLlamaCpp(name, request, threads)
    if engine in ("transformers", "ctranslate2"):
        raise AbsentError("its cost over long contexts is not measured")
    raise ValueError(f"unknown engine {name!r}: use fewfire or llama.cpp")
