"""The wanted sparsity rises to what was asked for, and then stays."""

from __future__ import annotations

import pytest

from fewfire.train.rise import Rise


def test_by_hand() -> None:
    rise = Rise(0.9, steps=100, start=0.5, share=0.5, rest=0.2)
    assert rise.sparsity(0) == pytest.approx(0.5)
    assert rise.sparsity(25) == pytest.approx(0.9 - 0.4 / 4)
    assert [rise.sparsity(step) for step in (50, 75, 1000)] == pytest.approx([0.9] * 3)
    assert [rise.moves(step) for step in (0, 79, 80, 99)] == [True, True, False, False]
    values = [rise.sparsity(step) for step in range(100)]
    assert values == sorted(values)


def test_less_than_the_start_is_wanted_from_the_beginning() -> None:
    assert {Rise(0.3, steps=10).sparsity(step) for step in range(10)} == {0.3}
