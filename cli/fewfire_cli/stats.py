"""One line about a generation's speed, the same for every command, and the same as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewfire import Stats


def stats_line(stats: Stats) -> str:
    """For people."""
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    return (
        f"prompt {stats.prompt_tokens} tokens{cached}, {stats.prompt_tokens_per_second:.1f} tokens/s;"
        f" answer {stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s"
    )


def stats_dict(stats: Stats) -> dict[str, Any]:
    """For programs."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "prompt_seconds": round(stats.prompt_seconds, 6),
        "prompt_tokens_per_second": round(stats.prompt_tokens_per_second, 3),
        "tokens": stats.tokens,
        "seconds": round(stats.seconds, 6),
        "tokens_per_second": round(stats.tokens_per_second, 3),
    }
