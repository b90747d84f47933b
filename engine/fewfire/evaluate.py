"""How well a model predicts a text: perplexity, alone or beside the same model with nothing left out.

The text is cut into windows that do not overlap; each is read from an empty cache, and every token of it
but the first is scored. A model that wants a BOS token gets one at the start of each window, and then all
the text's tokens are scored. Numbers of different windows, or of different tokenizers, are not comparable.

What a selection leaves out shows only in decoding, one token at a time; a window that is read at once is dense, unless
the model was trained with the selection.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

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

    @property
    def tokens_per_second(self) -> float:
        """Speed of scoring."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Comparison:
    """A model beside a dense one, over the same `tokens` scored tokens, both decoding one by one."""

    ppl: float
    dense_ppl: float
    growth: float  # ppl / dense_ppl - 1
    growth_error: float  # its standard error over the windows; NaN for one window
    kl: float  # mean over the tokens of KL(dense || model) of the next token's distribution, in nats
    agreement: float  # share of the tokens after which both hold the same next token likeliest
    tokens: int
    seconds: float


def perplexity(
    model: Model,
    text: str,
    *,
    window: int = 512,
    limit: int | None = None,
    decode: bool = False,
    progress: Progress | None = None,
) -> Perplexity:
    """Scores a text, or its first `limit` tokens; `decode`: reads one token at a time, as in generation.

    Raises `ValueError` for an impossible window or limit and for a text with nothing to score, `FewfireError` if the
    model's logits are not finite.
    """
    start, session, total, scored = time.perf_counter(), model.session(), 0.0, 0
    for tokens in _windows(model, text, window, limit, progress or silent):
        session.rewind(0)
        total += _window_nll(session, tokens, decode)
        scored += len(tokens) - 1
    nll = _finite(total) / scored
    return Perplexity(_exp(nll), nll, scored, time.perf_counter() - start)


def compare(
    model: Model,
    dense: Model,
    text: str,
    *,
    window: int = 512,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """What a model's selection costs on a text, or on its first `limit` tokens.

    `dense` is the same model, loaded with `dense=True`. Both decode, so that nothing but the selection differs: reading
    a window at once would round activations in other places. Raises as `perplexity` does, and `ValueError` if the two
    models do not have the same vocabulary.
    """
    if model.config.vocab_size != dense.config.vocab_size:
        raise ValueError("only models with the same vocabulary can be compared")
    if dense.context < window <= model.context:
        raise ValueError(f"window must be from 2 to the dense model's context of {dense.context} tokens, not {window}")
    start, sessions = time.perf_counter(), (model.session(), dense.session())
    counts, losses, dense_losses, divergence, agreed = [], [], [], 0.0, 0
    for tokens in _windows(model, text, window, limit, progress or silent):
        for session in sessions:
            session.rewind(0)
        loss = np.zeros(2)
        for token, target in pairwise(tokens):
            log_p, log_dense = (log_softmax(session.feed([token])) for session in sessions)
            loss -= log_p[target], log_dense[target]
            divergence += float(np.exp(log_dense) @ (log_dense - log_p))
            agreed += int(log_p.argmax() == log_dense.argmax())
        counts.append(len(tokens) - 1)
        losses.append(_finite(loss[0]))
        dense_losses.append(_finite(loss[1]))
    tokens_scored = sum(counts)
    growth, error = perplexity_growth(np.array(losses), np.array(dense_losses), np.array(counts))
    return Comparison(
        ppl=_exp(sum(losses) / tokens_scored),
        dense_ppl=_exp(sum(dense_losses) / tokens_scored),
        growth=growth,
        growth_error=error,
        kl=divergence / tokens_scored,
        agreement=agreed / tokens_scored,
        tokens=tokens_scored,
        seconds=time.perf_counter() - start,
    )


def perplexity_growth(losses: np.ndarray, base: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """By what share a perplexity is over another's, and that figure's standard error (NaN for one window).

    losses, base: summed -log p of the same windows, `(windows,)`; counts: the tokens scored in each. Both saw the same
    text, so the differences scatter far less than the perplexities themselves.
    """
    n, difference = len(counts), losses - base
    mean = difference.sum() / counts.sum()
    spread = float(((difference - mean * counts) ** 2).sum())
    error = math.sqrt(spread * n / (n - 1)) / counts.sum() if n > 1 else math.nan
    growth = math.expm1(min(mean, 700.0))
    return growth, (1 + growth) * error


def _windows(model: Model, text: str, window: int, limit: int | None, progress: Progress) -> Iterator[list[int]]:
    """The windows of a text, with progress in tokens."""
    if isinstance(window, bool) or not isinstance(window, int) or not 2 <= window <= model.context:
        raise ValueError(f"window must be from 2 to the model's context of {model.context} tokens, not {window!r}")
    cut = windows(model.tokenizer, model.config, text, window, limit)
    done, total = 0, sum(len(tokens) for tokens in cut)
    for tokens in cut:
        progress("perplexity", done, total)
        yield tokens
        done += len(tokens)
    progress("perplexity", done, total)


def _window_nll(session: Session, tokens: list[int], decode: bool) -> float:
    """Sum of -log p over all but the first of `tokens`, fed in parts so that the logits stay small."""
    part = 1 if decode else max(16, _LOGITS_AT_ONCE // session.model.config.vocab_size)
    total = 0.0
    for at in range(0, len(tokens) - 1, part):
        fed = tokens[at : min(at + part, len(tokens) - 1)]
        total += float(token_nll(session.feed(fed, all_logits=True), tokens[at + 1 : at + 1 + len(fed)]).sum())
    return total


def _finite(nll: float) -> float:
    if not math.isfinite(nll):
        raise FewfireError("the model computed no finite number for this text: its weights may be damaged")
    return float(nll)


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))


def token_nll(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """-log p of each target under its row of `(T, vocab)` logits, `(T,)` float64."""
    best = logits.max(axis=-1, keepdims=True)
    log_total = np.log(np.exp(logits - best).sum(axis=-1, dtype=np.float64))
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
    return log_total + best[:, 0] - chosen


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities of the tokens, `(..., vocab)` float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
