"""What a killed calibration has found is there the next time, and nothing half written is believed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from fewfire.notebook import Notebook


def never() -> float:
    raise AssertionError("computed again")


def test_goes_on(tmp_path: Path) -> None:
    first = Notebook(tmp_path, ["model", 1])
    value = 0.1 + 0.2
    assert first.number("a", lambda: value) == value
    first.keep("fit-0", cuts=np.arange(3.0), errors=np.full(3, np.inf))
    second = Notebook(tmp_path, ["model", 1])
    assert second.number("a", never) == value
    found = second.arrays("fit-0")
    assert found is not None
    np.testing.assert_array_equal(found["cuts"], np.arange(3.0))
    assert second.arrays("fit-1") is None


def test_another_key_is_another_notebook(tmp_path: Path) -> None:
    Notebook(tmp_path, ["model", 1]).number("a", lambda: 1)
    assert Notebook(tmp_path, ["model", 2]).number("a", lambda: 2) == 2
    assert Notebook(tmp_path, ["model", 1]).number("a", never) == 1


def test_half_written_entries(tmp_path: Path) -> None:
    Notebook(tmp_path, "k").number("a", lambda: 1)
    (directory,) = tmp_path.iterdir()
    with (directory / "numbers.jsonl").open("a") as file:
        file.write('{"b": 1')
    (directory / "fit-0.npz").write_bytes(b"PK\x03\x04half")
    book = Notebook(tmp_path, "k")
    assert book.arrays("fit-0") is None
    assert book.number("b", lambda: 2) == 2
    again = Notebook(tmp_path, "k")
    assert (again.number("a", never), again.number("b", never)) == (1, 2)


def test_removal(tmp_path: Path) -> None:
    old, other, ours = (Notebook(tmp_path, key) for key in ("old", "other", "ours"))
    for book in (old, other, ours):
        book.number("a", lambda: 1)
    long_ago = time.time() - 30 * 24 * 3600
    before = set(tmp_path.iterdir())
    ours.remove()
    (gone,) = before - set(tmp_path.iterdir())
    left = sorted(tmp_path.iterdir())
    assert len(left) == 2
    for path in (left[0] / "numbers.jsonl", left[0]):
        os.utime(path, (long_ago, long_ago))
    gone.mkdir()
    ours.remove()
    assert list(tmp_path.iterdir()) == [left[1]]
