"""A generation's speed and what it read of the weights: one line, the same for every command, and the same as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fewfire_cli.human import size

if TYPE_CHECKING:
    from fewfire import Model, Stats
    from fewfire.generate import Piece, Stream
    from fewfire_cli.statusline import StatusLine


class Reads:
    """How many bytes of the weights each token of an answer read."""

    def __init__(self, model: Model) -> None:
        self._dense = model.packed.bytes_per_token()
        self._tokens = self._sum = 0

    def watch(self, stream: Stream, status: StatusLine) -> Iterator[Piece]:
        """Passes an answer on, and shows what its last token read."""
        for number, piece in enumerate(stream):
            # The first token comes out of the prompt, and text that was held back out of none.
            if number and piece.token_id is not None:
                read = stream.session.bytes_read
                self._tokens, self._sum = self._tokens + 1, self._sum + read
                status.show(f"this token read {read / self._dense:.0%} of the weights; on average {self.mean}")
            yield piece

    @property
    def bytes_per_token(self) -> float:
        """The mean; 0 before the first token was decoded."""
        return self._sum / self._tokens if self._tokens else 0.0

    @property
    def mean(self) -> str:
        """`62% (68.1 MB of 108.0 MB)`: what a token read of the weights."""
        return f"{self.bytes_per_token / self._dense:.0%} ({size(self.bytes_per_token)} of {size(self._dense)})"

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"bytes_per_token": round(self.bytes_per_token), "dense_bytes_per_token": self._dense}


def stats_line(stats: Stats, reads: Reads) -> str:
    """For people."""
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    read = f"; read {reads.mean} of the weights a token" if reads.bytes_per_token else ""
    return (
        f"prompt {stats.prompt_tokens} tokens{cached}, {stats.prompt_tokens_per_second:.1f} tokens/s;"
        f" answer {stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s{read}"
    )


def stats_dict(stats: Stats, reads: Reads) -> dict[str, Any]:
    """For programs."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "prompt_seconds": round(stats.prompt_seconds, 6),
        "prompt_tokens_per_second": round(stats.prompt_tokens_per_second, 3),
        "tokens": stats.tokens,
        "seconds": round(stats.seconds, 6),
        "tokens_per_second": round(stats.tokens_per_second, 3),
        **reads.to_dict(),
    }
