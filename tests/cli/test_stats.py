"""What an answer is said to have read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fewfire.generate import Piece
from fewfire_cli.stats import Reads


def test_each_decoded_token_counts_once():
    """The first token comes out of the prompt, and held-back text at the end out of no token."""
    session, shown = SimpleNamespace(bytes_read=1000), []

    class Stream:
        def __init__(self) -> None:
            self.session = session

        def __iter__(self) -> Any:
            for number, piece in enumerate((Piece("a", 5), Piece("", 6), Piece("b", 7), Piece("held", None))):
                session.bytes_read = (1000, 300, 500, 999)[number]
                yield piece

    model: Any = SimpleNamespace(packed=SimpleNamespace(bytes_per_token=lambda: 1000))
    reads, stream, status = Reads(model), Stream(), SimpleNamespace(show=shown.append)
    assert [piece.text for piece in reads.watch(stream, status)] == ["a", "", "b", "held"]
    assert reads.to_dict() == {"bytes_per_token": 400, "dense_bytes_per_token": 1000}
    assert len(shown) == 2
    assert "50%" in shown[-1]
    assert "40%" in shown[-1]
