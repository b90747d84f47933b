"""A model that says what a test wants it to say, with a real tokenizer and a cache that is kept honest."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

import tiny
from fewfire.errors import ContextFullError
from fewfire.tokenizer import Tokenizer

EOS = tiny.SPECIALS.index("<|im_end|>")
BOS = tiny.SPECIALS.index("<|im_start|>")


class ScriptedSession:
    """After `prompt` tokens the logits name the script's first token, and so on; after the script, EOS."""

    def __init__(self, model: ScriptedModel) -> None:
        self.model, self.tokens, self.fed = model, [], []  # fed: one list per call

    def feed(self, ids: Sequence[int], *, all_logits: bool = False, prompt: bool = False) -> np.ndarray:
        assert ids, "feeding nothing"
        if len(self.tokens) + len(ids) > self.model.context:
            raise ContextFullError("the engine must not be asked for this")
        self.fed.append(list(ids))
        rows = []
        for token in ids:
            self.tokens.append(token)
            rows.append(self.model.logits_after(self.tokens))
        return np.stack(rows) if all_logits else rows[-1]

    def rewind(self, n: int) -> None:
        assert 0 <= n <= len(self.tokens)
        del self.tokens[n:]


class ScriptedModel:
    """The parts of `Model` that generation and evaluation use."""

    def __init__(self, script: str | Sequence[int] = "", prompt: int = 1, context: int = 100, **config: Any) -> None:
        self.tokenizer = Tokenizer.from_json(tiny.tiny_tokenizer())
        self.script = self.tokenizer.encode(script) if isinstance(script, str) else list(script)
        self.prompt, self.context = prompt, context
        fields = {"vocab_size": tiny.VOCAB_SIZE, "bos_token_id": BOS, "add_bos_token": False}
        self.config = SimpleNamespace(**fields | {"eos_token_ids": (EOS,)} | config)

    def session(self) -> ScriptedSession:
        return ScriptedSession(self)

    def logits_after(self, tokens: list[int]) -> np.ndarray:
        at = len(tokens) - self.prompt
        logits = np.ones(self.config.vocab_size, dtype=np.float32)
        logits[self.script[at] if 0 <= at < len(self.script) else EOS] = 10.0
        return logits
