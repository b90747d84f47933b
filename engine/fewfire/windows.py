"""Text cut into windows of tokens that a model reads one by one, each from an empty cache."""

from __future__ import annotations

from collections.abc import Sequence

from fewfire.config import ModelConfig
from fewfire.generate import check_unicode
from fewfire.tokenizer import Tokenizer


def windows(
    tokenizer: Tokenizer, config: ModelConfig, text: str, size: int, limit: int | None = None
) -> list[list[int]]:
    """The text, or its first `limit` tokens, in windows of up to `size` tokens that do not overlap.

    Each begins with a BOS token where the model wants one. A last window with nothing to predict is left out. Raises
    `ValueError` if `size` or `limit` is under 2 or the text has nothing to predict.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(f"a window must be at least 2 tokens, not {size!r}")
    if limit is not None and limit < 2:
        raise ValueError(f"limit must be at least 2 tokens, not {limit!r}")
    check_unicode(text, "the text")
    ids = tokenizer.encode(text)[:limit]
    cut = cut_tokens(ids, size, config.bos_token_id if config.add_bos_token else None)
    if not cut:
        raise ValueError(f"the text has {len(ids)} tokens: at least 2 are needed to score one")
    return cut


def cut_tokens(ids: Sequence[int], size: int, bos: int | None = None) -> list[list[int]]:
    """Tokens in windows of `size`, each beginning with `bos` if there is one; none without a token to predict."""
    first = [] if bos is None else [bos]
    step = size - len(first)
    cut = [[*first, *ids[at : at + step]] for at in range(0, len(ids), step)]
    return [window for window in cut if len(window) > 1]


def some(cut: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """About so many tokens of the windows, whole windows from all over the text as far as possible."""
    size = max(len(window) for window in cut)
    if tokens < size:
        return [cut[len(cut) // 2][:tokens]]
    count = min(len(cut), tokens // size)
    return [cut[i * len(cut) // count] for i in range(count)]
