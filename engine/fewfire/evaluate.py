"""How well a model predicts a text: perplexity.

The text is cut into windows that do not overlap; each is read from an empty cache, and every token of it
but the first is scored. A model that wants a BOS token gets one at the start of each window, and then all
the text's tokens are scored. Numbers of different windows, or of different tokenizers, are not comparable.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fewfire.errors import FewfireError
from fewfire.generate import check_unicode
from fewfire.progress import Progress

if TYPE_CHECKING:
    from fewfire.model import Model
    from fewfire.session import Session

_LOGITS_AT_ONCE = 2**24  # 64 MB of float32


@dataclass(frozen=True)
class Perplexity:
    """`ppl` is exp(`nll`), the mean over `tokens` scored tokens of -log p, in nats."""

    ppl: float
    nll: float
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of scoring."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def perplexity(
    model: Model, text: str, *, window: int = 512, limit: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """Scores a text, or its first `limit` tokens."""
    if isinstance(window, bool) or not isinstance(window, int) or not 2 <= window <= model.context:
        raise ValueError(f"window must be from 2 to the model's context of {model.context} tokens, not {window!r}")
    if limit is not None and limit < 2:
        raise ValueError(f"limit must be at least 2 tokens, not {limit!r}")
    check_unicode(text, "the text")
    config = model.config
    bos = [config.bos_token_id] if config.add_bos_token and config.bos_token_id is not None else []
    ids = model.tokenizer.encode(text)[:limit]
    if len(ids) + len(bos) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: at least 2 are needed to score one")

    session = model.session()
    step = window - len(bos)
    total, scored, start = 0.0, 0, time.perf_counter()
    for at in range(0, len(ids), step):
        if progress:
            progress("perplexity", at, len(ids))
        tokens = bos + ids[at : at + step]
        if len(tokens) > 1:
            session.rewind(0)
            total += _window_nll(session, tokens)
            scored += len(tokens) - 1
    if progress:
        progress("perplexity", len(ids), len(ids))
    if not math.isfinite(total):
        raise FewfireError("the model computed no finite number for this text: its weights may be damaged")
    nll = total / scored
    return Perplexity(math.exp(min(nll, 700.0)), nll, scored, time.perf_counter() - start)


def _window_nll(session: Session, tokens: list[int]) -> float:
    """Sum of -log p over all but the first of `tokens`, fed in parts so that the logits stay small."""
    part = max(16, _LOGITS_AT_ONCE // session.model.config.vocab_size)
    total = 0.0
    for at in range(0, len(tokens) - 1, part):
        fed = tokens[at : min(at + part, len(tokens) - 1)]
        total += float(token_nll(session.feed(fed, all_logits=True), tokens[at + 1 : at + 1 + len(fed)]).sum())
    return total


def token_nll(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """-log p of each target under its row of `(T, vocab)` logits, `(T,)` float64."""
    best = logits.max(axis=-1, keepdims=True)
    log_total = np.log(np.exp(logits - best).sum(axis=-1, dtype=np.float64))
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
    return log_total + best[:, 0] - chosen
