"""Safetensors files: the same rows as the library reads, and damage that is found before anything is read."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fewfire.errors import CheckpointError
from fewfire.tensorfile import read_header, read_rows, readable
from tiny import write_safetensors


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with any header, true or false."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.fixture
def values() -> np.ndarray:
    return np.random.RandomState(0).standard_normal((7, 5)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_reads_what_the_library_wrote(dtype: str, values: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"b": values.astype(dtype), "a": values[0].astype(dtype)}, file, metadata={"format": "pt"})
    entries, library = read_header(file), load_file(file)
    assert entries.keys() == library.keys()
    for name, expected in library.items():
        rows = read_rows(entries[name], 0, len(expected))
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        np.testing.assert_array_equal(rows, expected.astype(np.float32))


def test_bf16_is_the_upper_half_of_a_float32(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    exact = np.array([[1.0, -2.5, 3.140625], [0.0, -0.0, 2.0**-130]], np.float32)
    write_safetensors(file, {"t": exact}, "bf16")
    rows = read_rows(read_header(file)["t"], 0, 2)
    np.testing.assert_array_equal(rows.view(np.uint32), exact.view(np.uint32))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 1), (3, 5), (6, 7), (4, 4)])
def test_row_ranges(dtype: Any, start: int, stop: int, values: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"other": values, "t": values}, dtype)
    tensor = read_header(file)["t"]
    np.testing.assert_array_equal(read_rows(tensor, start, stop), read_rows(tensor, 0, 7)[start:stop])


def test_a_row_costs_a_row(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"t": np.ones((4096, 1024), np.float32)}, file)
    tracemalloc.start()
    read_rows(read_header(file)["t"], 1000, 1004)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 40, 80, -101, -100, -1])
def test_truncated(kept: int, values: np.ndarray, tmp_path: Path) -> None:
    """In the length, in the header, between header and data, in the last byte."""
    file = tmp_path / "x.safetensors"
    save_file({"t": values}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=r"^.*x\.safetensors: truncated") as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_becomes_shorter_later(values: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"t": values}, file)
    tensor = read_header(file)["t"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="shorter"):
        read_rows(tensor, 0, 7)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_rows(tensor, 0, 7)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40])
def test_absurd_header_length(length: int, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}" * 100)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"the header claims {length} bytes, the file has 208"):
        read_header(file)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "header is damaged"),
        (b"{not json", "header is damaged"),
        (b"\xff\xfe\x00", "header is damaged"),
        (b"[" * 100_000, "header is damaged"),
        ([1, 2], "header is damaged"),
        ({"t": None}, "entry of tensor 't' is damaged"),
        ({"t": [1, 2, 3]}, "entry of tensor 't' is damaged"),
        ({"t": {"dtype": "F32", "shape": [2, 3]}}, "entry of tensor 't' is damaged"),
        (entry(dtype=None), "entry of tensor 't' is damaged"),  # type: ignore[arg-type]
        (entry(dtype=[]), "entry of tensor 't' is damaged"),  # type: ignore[arg-type]
        (entry(shape=(-2, -3)), "entry of tensor 't' is damaged"),
        (entry(shape=(2.0, 3)), "entry of tensor 't' is damaged"),
        (entry(shape=(True, 6)), "entry of tensor 't' is damaged"),
        (entry(shape=6), "entry of tensor 't' is damaged"),
        (entry(shape=(2, 4)), "entry of tensor 't' is damaged"),
        (entry(shape=(2**40, 2**40)), "entry of tensor 't' is damaged"),
        (entry(offsets=(24, 0)), "entry of tensor 't' is damaged"),
        (entry(offsets=(0, 24, 48)), "entry of tensor 't' is damaged"),
        (entry(offsets=(-4, 20)), "entry of tensor 't' is damaged"),
        (entry(offsets=(4, 28)), "truncated: tensor 't' ends at"),
        (entry(shape=(2**40, 2), offsets=(0, 2**43)), "truncated: tensor 't' ends at"),
        (entry(dtype="Q9", offsets=(0, 2**50)), "truncated: tensor 't' ends at"),
    ],
)
def test_damaged_headers(header: Any, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", header, bytes(24))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


def test_other_formats_are_listed_but_not_readable(tmp_path: Path) -> None:
    for dtype, size in (("I64", 48), ("F8_E4M3", 6), ("SOMETHING_NEW", 24)):
        file = write(tmp_path / "x.safetensors", entry(dtype=dtype, offsets=(0, size)), bytes(size))
        assert not readable(read_header(file)["t"])


def test_names_in_messages_stay_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", {"a\nb" * 1000: None})
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
