"""GGUF headers and rows: the same as the gguf package reads, and no count is believed."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from fewfire.errors import CheckpointError
from fewfire.gguffile import can_dequantize, read_header, read_rows

KINDS = [kind for kind in GGMLQuantizationType if can_dequantize(kind)]
HEAD = b"GGUF" + struct.pack("<I", 3)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def file(path: Path, tensors: int, pairs: int, body: bytes) -> Path:
    """A file with any counts and anything after them."""
    path.write_bytes(HEAD + struct.pack("<QQ", tensors, pairs) + body)
    return path


def tensor_info(name: str = "t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + packed + struct.pack("<IQ", kind, offset)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(path: Path) -> Path:
    """One of every kind of metadata, and two tensors."""
    writer = GGUFWriter(path, "test")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"n.{kind}", 100)
    writer.add_float32("n.float32", 1e-5)
    writer.add_float64("n.float64", 0.1)
    writer.add_bool("n.bool", True)
    writer.add_string("text", "é\n")
    writer.add_array("strings", ["a", "", "ü"])
    writer.add_array("floats", [0.5, -1.0])
    writer.add_array("ints", [1, -2, 3])
    writer.add_tensor("a", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("b", np.arange(5, dtype=np.float16))
    finish(writer)
    return path


def test_metadata(tmp_path: Path) -> None:
    metadata = read_header(write(tmp_path / "x.gguf")).metadata
    assert metadata["general.architecture"] == "test"
    assert {value for key, value in metadata.items() if "int" in key and key.startswith("n.")} == {100}
    assert metadata["n.float32"] == 1e-5  # as it was written, not as float32 rounds it
    assert metadata["n.float64"] == 0.1
    assert metadata["n.bool"] is True
    assert metadata["text"] == "é\n"
    assert metadata["strings"] == ["a", "", "ü"]
    np.testing.assert_array_equal(metadata["floats"], [0.5, -1.0])
    np.testing.assert_array_equal(metadata["ints"], [1, -2, 3])


def test_tensors_as_the_package_reads_them(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    tensors = read_header(path).tensors
    for theirs in GGUFReader(path).tensors:
        ours = tensors[theirs.name]
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        np.testing.assert_array_equal(read_rows(ours, 0, ours.shape[0]), theirs.data.astype(np.float32))
    np.testing.assert_array_equal(read_rows(tensors["b"], 1, 3), [1, 2])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_of_every_number_format(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """Any bytes will do as weights, as long as no float16 in them is infinite."""
    writer = GGUFWriter(tmp_path / "x.gguf", "test")
    block, size = GGML_QUANT_SIZES[kind]
    width = 512 // block * size
    raw = np.random.RandomState(0).randint(0, 0x40, (7, width)).astype(np.uint8)
    raw = raw.view(np.float32) if kind == GGMLQuantizationType.F32 else raw
    writer.add_tensor("t", raw, raw_dtype=kind)
    finish(writer)
    tensor = read_header(tmp_path / "x.gguf").tensors["t"]
    whole = dequantize(raw, kind)
    assert tensor.shape == whole.shape
    for start, stop in ((0, 7), (2, 5), (6, 7), (3, 3)):
        rows = read_rows(tensor, start, stop)
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        np.testing.assert_array_equal(rows, whole[start:stop])


def test_a_row_costs_a_row(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "test")
    writer.add_tensor("t", np.ones((4096, 1024), np.float32))
    finish(writer)
    tracemalloc.start()
    read_rows(read_header(tmp_path / "x.gguf").tensors["t"], 100, 104)
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()


def test_truncated_anywhere(tmp_path: Path) -> None:
    """Every cut of a small file, from nothing to all but one byte."""
    path = write(tmp_path / "x.gguf")
    whole = path.read_bytes()
    last = read_header(path).tensors["b"]
    end = last.offset + last.row_bytes
    for kept in range(end):
        path.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        message = str(caught.value)
        assert "truncated" in message or kept < 4
        assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1 is not supported"),
        (b"GGUF" + struct.pack("<I", 99) + bytes(100), "version 99 is not supported; supported: 2, 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
    ],
)
def test_what_is_no_gguf(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "x.gguf")


HUGE = 2**64 - 1


@pytest.mark.parametrize(
    ("tensors", "pairs", "body", "message"),
    [
        (HUGE, 0, b"", "truncated"),
        (0, HUGE, b"", "truncated"),
        (2**40, 2**40, bytes(10_000), "truncated"),
        (0, 1, struct.pack("<Q", HUGE), "truncated"),
        (0, 1, struct.pack("<Q", 2**62) + bytes(100), "truncated"),
        (0, 1, string("k") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(100), "truncated"),
        (0, 1, string("k") + struct.pack("<IIQ", 9, 0, 2**62) + bytes(100), "truncated"),
        (0, 1, string("k") + struct.pack("<IIQ", 9, 6, 2**62 + 1) + bytes(100), "truncated"),
        (0, 1, string("k") + struct.pack("<IIQ", 9, 9, 2**62) + bytes(100), "array of type 9"),
        (0, 1, string("k") + struct.pack("<IQ", 8, HUGE) + bytes(100), "truncated"),
        (0, 1, string("k") + struct.pack("<I", 77) + bytes(100), "unknown type 77"),
        (1, 0, struct.pack("<Q", HUGE) + bytes(100), "truncated"),
        (1, 0, string("t") + struct.pack("<I", 2**31) + bytes(100), "claims 2147483648 dimensions"),
        (1, 0, string("t") + struct.pack("<I", 0) + bytes(100), "claims 0 dimensions"),
        (1, 0, tensor_info(dims=(2**63, 2**63)) + bytes(100), "truncated: tensor 't' ends at"),
        (1, 0, tensor_info(offset=HUGE) + bytes(100), "truncated: tensor 't' ends at"),
        (1, 0, tensor_info(kind=999) + bytes(100), "unknown number format 999"),
        (1, 0, tensor_info(dims=(33,), kind=2) + bytes(100), "entry of tensor 't' is damaged"),
        (2, 0, tensor_info() * 2 + bytes(100), "entry of tensor 't' is damaged"),
        (0, 1, string("general.alignment") + struct.pack("<II", 4, 0) + bytes(100), "power of two"),
        (0, 1, string("general.alignment") + struct.pack("<II", 4, 48) + bytes(100), "power of two"),
        (0, 1, string("general.alignment") + struct.pack("<I", 8) + string("x"), "power of two"),
    ],
)
def test_absurd_headers(tensors: int, pairs: int, body: bytes, message: str, tmp_path: Path) -> None:
    path = file(tmp_path / "x.gguf", tensors, pairs, body)
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert time.perf_counter() - start < 0.5
    assert "\n" not in str(caught.value)


def test_alignment(tmp_path: Path) -> None:
    pair = string("general.alignment") + struct.pack("<II", 4, 256)
    path = file(tmp_path / "x.gguf", 1, 1, pair + tensor_info())
    data = path.read_bytes()
    path.write_bytes(data + bytes(256 - len(data)) + np.arange(4, dtype="<f4").tobytes())
    np.testing.assert_array_equal(read_rows(read_header(path).tensors["t"], 0, 4), [0, 1, 2, 3])


def test_a_file_that_becomes_shorter_later(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    tensor = read_header(path).tensors["a"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="shorter"):
        read_rows(tensor, 0, 3)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_rows(tensor, 0, 3)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    pair = struct.pack("<Q", 1) + b"k" + struct.pack("<IQ", 8, 2) + b"a\xff"
    assert read_header(file(tmp_path / "x.gguf", 0, 1, pair)).metadata == {"k": "a\N{REPLACEMENT CHARACTER}"}
