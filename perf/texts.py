"""Parts of texts, by which those that are fitted to and those that are judged on are told apart."""

from __future__ import annotations


def part_of(text: str, part: str) -> str:
    """The share of a text's characters that "0.8:1.0" and the like name."""
    start, stop = (float(share) for share in part.split(":"))
    return text[int(len(text) * start) : int(len(text) * stop)]
