"""Typed configuration values: what passes, and what the errors say."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fewfire.errors import CheckpointError
from fewfire.fields import Fields, unique


@pytest.mark.parametrize(("value", "expected"), [(1, 1), (10, 10), (3.0, 3)])
def test_whole_numbers(value: Any, expected: int) -> None:
    assert Fields({"n": value}, "f").whole("n", 1, 10) == expected


@pytest.mark.parametrize("value", [0, 11, -1, 1.5, True, "3", [3], float("nan"), float("inf"), 1e300, 10**400])
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^f: n is .*, expected a whole number from 1 to 10$"):
        Fields({"n": value}, "f").whole("n", 1, 10)


@pytest.mark.parametrize("data", [{}, {"n": None}])
def test_missing_and_null_are_the_same(data: dict[str, Any]) -> None:
    fields = Fields(data, "config.json")
    assert fields.whole("n", 1, 2, default=7) == 7
    assert fields.number("n", 1, 2, default=7) == 7.0
    assert fields.flag("n", True) is True
    assert fields.text("n", default="x") == "x"
    assert fields.section("n") is None
    assert fields.items("n", 3) is None
    assert fields.ids("n", 10) == ()
    assert "n" not in fields
    with pytest.raises(CheckpointError, match=r"^config.json: n is missing, expected a string$"):
        fields.text("n")


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        (lambda f: f.number("x", 0, 1), 2, "a number from 0 to 1"),
        (lambda f: f.number("x", 0, 1), float("nan"), "a number from 0 to 1"),
        (lambda f: f.number("x", 0, 1), False, "a number from 0 to 1"),
        (lambda f: f.flag("x", True), 1, "true or false"),
        (lambda f: f.text("x"), 5, "a string"),
        (lambda f: f.section("x"), [], "an object"),
        (lambda f: f.items("x", 2), [1], "a list of 2 entries"),
        (lambda f: f.ids("x", 5), [1, 5], "token ids from 0 to 4"),
        (lambda f: f.ids("x", 5), -1, "token ids from 0 to 4"),
        (lambda f: f.ids("x", 5), "2", "token ids from 0 to 4"),
    ],
)
def test_errors_say_what_was_expected(read: Any, value: Any, expected: str) -> None:
    with pytest.raises(CheckpointError, match=f"^f: x is .*, expected {re.escape(expected)}$"):
        read(Fields({"x": value}, "f"))


@pytest.mark.parametrize("value", ["a\nb" * 1000, list(range(10**5)), np.zeros(10**5), {"a": "b" * 500}])
def test_errors_stay_one_short_line(value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        Fields({"x": value}, "f").whole("x", 0, 1)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 150


def test_sections_name_where_they_are() -> None:
    section = Fields({"rope": {"factor": -1}}, "config.json").section("rope")
    assert section is not None
    with pytest.raises(CheckpointError, match=r"^config.json: rope: factor is -1"):
        section.number("factor", 0, 1)


def test_ids_and_unique() -> None:
    assert Fields({"a": 3, "b": [2, 1, 2]}, "f").ids("a", 4) == (3,)
    assert unique(Fields({"b": [2, 1, 2]}, "f").ids("b", 4)) == (2, 1)
