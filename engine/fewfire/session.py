"""One conversation: a KV cache and the tokens it holds."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fewfire.engine import BATCH
from fewfire.errors import ContextFullError

if TYPE_CHECKING:
    from fewfire.model import Model

_FIRST_CAPACITY = 256


class Session:
    """Tokens that the model has read, with their keys and values. Any number of sessions share a model.

    A session is for one thread at a time; different sessions may be used from different threads.
    `tokens` are the ids in the cache, `bytes_read` the bytes of weights that its last decoded token read, those that a
    dense one does before the first; treat both as read-only.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tokens: list[int] = []
        self.bytes_read = model.packed.bytes_per_token()
        self._cache = model.engine.new_cache(min(_FIRST_CAPACITY, model.context))

    def feed(self, ids: Sequence[int], *, all_logits: bool = False, prompt: bool = False) -> np.ndarray:
        """Reads tokens; returns the logits after the last one, `(vocab,)` float32, or after each, `(len(ids), vocab)`.

        Several are read at once, with all weights. A single one is decoded, and what the model's selection leaves out
        is not read, unless it is a `prompt`, or what is left of one.

        Raises `ValueError` for no tokens or an id outside the vocabulary, `TypeError` for what is not a whole number,
        `ContextFullError` if they do not fit.
        """
        vocab, ids = self.model.config.vocab_size, [operator.index(i) for i in ids]
        if not ids:
            raise ValueError("there are no tokens to read")
        if min(ids) < 0 or max(ids) >= vocab:
            raise ValueError(f"token ids must be from 0 to {vocab - 1}")
        self._reserve(len(self.tokens) + len(ids))
        if len(ids) == 1 and not prompt:
            last = self._decode(ids[0], vocab)
            return last[None] if all_logits else last
        logits = np.empty((len(ids) if all_logits else 1, vocab), np.float32)
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            rows = logits[start : start + BATCH] if all_logits else logits
            self.model.engine.prefill(part, len(self.tokens), self._cache, rows)
            self.tokens.extend(part)
        return logits if all_logits else logits[0]

    def _decode(self, token: int, vocab: int) -> np.ndarray:
        """The logits after one more token. Short, because all that Python touches is out of the caches by now."""
        logits = np.empty(vocab, np.float32)
        self.bytes_read = self.model.engine.decode(token, len(self.tokens), self._cache, logits)
        self.tokens.append(token)
        return logits

    def rewind(self, n: int) -> None:
        """Keeps the first `n` tokens and forgets the rest. Raises `ValueError` if there are fewer."""
        if not 0 <= n <= len(self.tokens):
            raise ValueError(f"cannot keep {n} of {len(self.tokens)} tokens")
        del self.tokens[n:]

    def _reserve(self, count: int) -> None:
        context = self.model.context
        if count > context:
            raise ContextFullError(
                f"{count} tokens do not fit the context of {context}; start a new conversation or shorten the prompt"
            )
        capacity = self._cache.capacity
        if count > capacity:
            self._cache = self._cache.grown(min(context, max(count, 2 * capacity)), len(self.tokens))
