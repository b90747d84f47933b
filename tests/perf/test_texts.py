"""Shares of texts meet without a gap and without an overlap."""

from perf.texts import part_of


def test_parts_are_shares_of_the_characters() -> None:
    text = "".join(chr(0x3B1 + i % 24) for i in range(101))
    assert part_of(text, "0:1") == text
    assert part_of(text, "0:0.8") + part_of(text, "0.8:1.0") == text
    assert len(part_of(text, "0.8:1.0")) == 21
