"""What a killed calibration has found is there the next time, and nothing half written is believed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fewfire.errors import FewfireError
from fewfire.notebook import Notebook


def never() -> float:
    raise AssertionError("computed again")


@contextmanager
def notebook(parent: Path, key: object = "k") -> Iterator[Notebook]:
    book = Notebook(parent, key)
    yield book
    book.close()


def directories(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir())


def test_goes_on(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    with notebook(tmp_path) as first:
        assert first.number("a", lambda: value) == value
        first.keep("fit-0", cuts=np.arange(3.0), errors=np.full(3, np.inf))
    with notebook(tmp_path) as second:
        assert second.number("a", never) == value
        found = second.arrays("fit-0")
        assert found is not None
        np.testing.assert_array_equal(found["cuts"], np.arange(3.0))
        assert second.arrays("fit-1") is None


def test_another_key_is_another_notebook(tmp_path: Path) -> None:
    for key, value in (("one", 1), ("two", 2)):
        with notebook(tmp_path, key) as book:
            assert book.number("a", lambda value=value: value) == value  # type: ignore[misc]
    with notebook(tmp_path, "one") as book:
        assert book.number("a", never) == 1


@pytest.mark.parametrize("end", [b'{"b": 1', b"\x00" * 40, b"\xff\xfe"])
def test_half_written_numbers(tmp_path: Path, end: bytes) -> None:
    with notebook(tmp_path) as book:
        book.number("a", lambda: 1)
    (directory,) = directories(tmp_path)
    with (directory / "numbers.jsonl").open("ab") as file:
        file.write(end)
    with notebook(tmp_path) as book:
        assert book.number("b", lambda: 2) == 2
    with notebook(tmp_path) as book:
        assert (book.number("a", never), book.number("b", never)) == (1, 2)


def test_damaged_arrays(tmp_path: Path) -> None:
    """As after a power cut, at any length from nothing on, and with any byte changed."""
    with notebook(tmp_path) as book:
        book.keep("fit", cuts=np.arange(3.0), errors=np.zeros(2))
        (directory,) = directories(tmp_path)
        whole = (directory / "fit.npz").read_bytes()
        for length in (*range(0, len(whole), 7), len(whole) - 1):
            (directory / "fit.npz").write_bytes(whole[:length])
            assert book.arrays("fit") is None
        for place in range(len(whole)):
            for bit in (1, 128):
                (directory / "fit.npz").write_bytes(bytes([*whole[:place], whole[place] ^ bit, *whole[place + 1 :]]))
                found = book.arrays("fit")
                assert found is None or list(found["cuts"]) == [0, 1, 2]
        book.keep("fit", cuts=np.arange(4.0))
        assert book.arrays("fit") is not None


def test_only_one_is_open(tmp_path: Path) -> None:
    with notebook(tmp_path, "ours") as book:
        book.number("a", lambda: 1)
        for key in ("ours", "theirs"):
            with pytest.raises(FewfireError, match="is being calibrated already"):
                Notebook(tmp_path, key)
        program = "import sys; from fewfire.notebook import *; Notebook(Path(sys.argv[1]), 'ours').remove()"
        other = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
        assert "is being calibrated already" in other.stderr
        book.keep("fit", cuts=np.arange(3.0))
    again = Notebook(tmp_path, "ours")
    assert again.number("a", never) == 1
    again.remove()
    assert Notebook(tmp_path, "ours").number("a", lambda: 2) == 2


def test_a_disk_that_does_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with notebook(tmp_path) as book:
        monkeypatch.setattr(np, "savez", full)
        with pytest.raises(FewfireError, match=r"cannot write .*No space left on device"):
            book.keep("fit", cuts=np.arange(3.0))
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(FewfireError, match="make room"):
            book.number("a", lambda: 1)
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(FewfireError, match="No space left on device"):
        Notebook(tmp_path, "another")


def test_removal(tmp_path: Path) -> None:
    for key in ("old", "other", "ours"):
        with notebook(tmp_path, key) as book:
            book.number("a", lambda: 1)
    before = directories(tmp_path)
    Notebook(tmp_path, "ours").remove()
    left = directories(tmp_path)
    assert len(left) == len(before) - 1 == 2
    long_ago = time.time() - 30 * 24 * 3600
    for path in (left[0] / "numbers.jsonl", left[0]):
        os.utime(path, (long_ago, long_ago))
    Notebook(tmp_path, "ours").remove()
    assert directories(tmp_path) == [left[1]]
