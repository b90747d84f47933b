"""How well a model predicts a text: perplexity, alone or beside the same model with nothing left out.

The text is cut into windows that do not overlap; each is read from an empty cache, and every token of it
but the first is scored. A model that wants a BOS token gets one at the start of each window, and then all
the text's tokens are scored. Numbers of different windows, or of different tokenizers, are not comparable.

What a selection leaves out shows only in decoding, one token at a time; a window that is read at once is dense, unless
the model was trained with the selection. The comparison with dense is that of `damage.py`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fewfire import damage
from fewfire.errors import FewfireError
from fewfire.progress import Progress, silent
from fewfire.windows import windows

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
    method: str  # what decided what was left out, "dense" where windows were read at once
    bytes_per_token: float | None  # of weights; None where windows were read at once

    @property
    def tokens_per_second(self) -> float:
        """Speed of scoring."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Comparison:
    """A model beside itself with nothing left out, over the same `tokens` scored tokens, both decoding one by one.

    Standard errors are over the windows, and infinite for a single one. KL is KL(dense || model) of the next token's
    distribution, in nats: of dense's 512 most probable tokens, and of 512 that stand for all others.
    """

    method: str  # what decides what is left out
    ppl: float
    dense_ppl: float
    growth: float  # ppl / dense_ppl - 1
    growth_error: float
    kl: float  # mean over the tokens
    kl_error: float
    kl_median: float
    kl_99: float  # 99 % of the tokens have less
    kl_max: float
    agreement: float  # share of the tokens after which both hold the same next token likeliest
    agreement_error: float
    tokens: int
    bytes_per_token: float  # of weights
    dense_bytes_per_token: int
    tokens_per_second: float  # decoding; of one after the other, so only roughly comparable
    dense_tokens_per_second: float


def perplexity(
    model: Model,
    text: str,
    *,
    window: int = 512,
    limit: int | None = None,
    decode: bool = False,
    progress: Progress = silent,
) -> Perplexity:
    """Scores a text, or its first `limit` tokens; `decode`: reads one token at a time, as in generation.

    Raises `ValueError` for an impossible window or limit and for a text with nothing to score, `FewfireError` if the
    model's logits are not finite.
    """
    start, session, total, read, done = time.perf_counter(), model.session(), 0.0, 0, 0
    cut = _cut(model, text, window, limit)
    every = sum(len(tokens) for tokens in cut)
    for tokens in cut:
        progress("perplexity", done, every)
        session.rewind(0)
        nll, n_bytes = _window_nll(session, tokens, decode)
        total, read = total + nll, read + n_bytes
        done += len(tokens)
    progress("perplexity", done, every)
    if not math.isfinite(total):
        raise FewfireError(damage.NOT_FINITE)
    scored = every - len(cut)
    nll, method = total / scored, model.engine.method if decode else "dense"
    seconds = time.perf_counter() - start
    return Perplexity(_exp(nll), nll, scored, seconds, method, read / scored if decode else None)


def compare(
    model: Model, text: str, *, window: int = 512, limit: int | None = None, progress: Progress = silent
) -> Comparison:
    """What it costs on a text, or on its first `limit` tokens, that the model leaves something out.

    Dense decodes, too, so that nothing but the selection differs: reading a window at once would round activations in
    other places. The engine is borrowed for that: sessions in other threads wait. Raises as `perplexity` does, and
    `ValueError` if the model leaves nothing out.
    """
    engine, method = model.engine, model.engine.method
    if method == "dense":
        raise ValueError("nothing is left out, so there is nothing to compare: run `fewfire calibrate` on the model")
    cut = _cut(model, text, window, limit)
    with engine.borrowed():
        engine.select(None, dense=True, progress=progress)
        dense = damage.observe_dense(model, cut, progress)
    found = damage.measure(model, cut, dense, progress, f"measuring {method}")
    nll = -float(dense.target.mean())
    return Comparison(
        method=method,
        ppl=_exp(nll + float(found.grown.mean())),
        dense_ppl=_exp(nll),
        growth=found.growth,
        growth_error=found.error,
        kl=float(found.kl.mean()),
        kl_error=found.error_of(found.kl),
        kl_median=float(np.median(found.kl)),
        kl_99=float(np.quantile(found.kl, 0.99)),
        kl_max=float(found.kl.max()),
        agreement=float(found.agree.mean()),
        agreement_error=found.error_of(found.agree),
        tokens=len(found.kl),
        bytes_per_token=found.bytes_per_token,
        dense_bytes_per_token=model.packed.bytes_per_token(),
        tokens_per_second=1 / float(found.seconds.mean()),
        dense_tokens_per_second=1 / float(dense.seconds.mean()),
    )


def _cut(model: Model, text: str, window: int, limit: int | None) -> list[list[int]]:
    """The windows of a text."""
    if isinstance(window, bool) or not isinstance(window, int) or not 2 <= window <= model.context:
        raise ValueError(f"window must be from 2 to the model's context of {model.context} tokens, not {window!r}")
    return windows(model.tokenizer, model.config, text, window, limit)


def _window_nll(session: Session, tokens: list[int], decode: bool) -> tuple[float, int]:
    """Sum of -log p over all but the first of `tokens`, fed in parts so that the logits stay small.

    And of the bytes of weights, if each is decoded.
    """
    part = 1 if decode else max(16, _LOGITS_AT_ONCE // session.model.config.vocab_size)
    total, read = 0.0, 0
    for at in range(0, len(tokens) - 1, part):
        fed = tokens[at : min(at + part, len(tokens) - 1)]
        logits = session.feed(fed, all_logits=True, prompt=not decode)
        total += float(token_nll(logits, tokens[at + 1 : at + 1 + len(fed)]).sum())
        read += session.bytes_read if decode else 0
    return total, read


def _exp(nll: float) -> float:
    return math.exp(min(nll, damage.LARGEST))


def token_nll(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """-log p of each target under its row of `(T, vocab)` logits, `(T,)` float64."""
    return damage.log_total(logits) - logits[np.arange(len(targets)), targets].astype(np.float64)
