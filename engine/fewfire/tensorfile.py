"""Reading rows of tensors out of one .safetensors file, in f32, f16 or bf16.

Promises that a header is believed only as far as the file is long, that nothing of the size a header claims
is allocated before that, and that a read touches the asked rows alone (plain reads, not a memory map, so
that streaming through a large file does not count as memory in use). The safetensors library is not used
here because its NumPy side cannot read bf16. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fewfire.errors import CheckpointError

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_INTEGERS: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "U8": np.dtype("u1")}
_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `offset` is from the beginning of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of the file. Raises `CheckpointError` on a header that does not fit the file."""
    header, begin, size = _header(path)
    header.pop("__metadata__", None)
    return {name: _entry(path, name, info, begin, size) for name, info in header.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """What the file says about itself. Raises `CheckpointError` on a damaged header."""
    found = _header(path)[0].get("__metadata__", {})
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begins, and the size of the file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path}: truncated or not a safetensors file "
                    f"(the header claims {length} bytes, the file has {size}); fetch it again"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: the safetensors header is damaged; fetch the file again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is damaged; fetch the file again")
    return header, 8 + length, size


def read_rows(entry: Entry, start: int, stop: int) -> np.ndarray:
    """Rows start:stop of the first axis, float32 and C-contiguous. Raises `CheckpointError`."""
    dtype = _DTYPES[entry.dtype]
    row = math.prod(entry.shape[1:])
    try:
        data = np.fromfile(entry.path, dtype, (stop - start) * row, offset=entry.offset + start * row * dtype.itemsize)
    except OSError as error:
        raise CheckpointError(f"{entry.path}: cannot be read ({error.strerror})") from None
    if data.size != (stop - start) * row:
        raise CheckpointError(f"{entry.path}: the file has become shorter while it was read")
    if entry.dtype == "BF16":  # the upper half of a float32
        wide = data.astype(np.uint32)
        wide <<= 16
        data = wide.view(np.float32)
    return data.astype(np.float32, copy=False).reshape(stop - start, *entry.shape[1:])


def read_integers(entry: Entry, dtype: Literal["I32", "U8"] = "I32") -> np.ndarray:
    """A whole tensor of integers, which must be stored as `dtype`. Raises `CheckpointError`."""
    if entry.dtype != dtype:
        raise CheckpointError(f"{entry.path}: a tensor of integers is stored as {entry.dtype}, not as {dtype}")
    try:
        data = np.fromfile(entry.path, _INTEGERS[dtype], math.prod(entry.shape), offset=entry.offset)
    except OSError as error:
        raise CheckpointError(f"{entry.path}: cannot be read ({error.strerror})") from None
    if data.size != math.prod(entry.shape):
        raise CheckpointError(f"{entry.path}: the file has become shorter while it was read")
    return data.reshape(entry.shape)


def _entry(path: Path, name: str, info: Any, base: int, size: int) -> Entry:
    """One line of the header, checked against the length of the file."""
    try:
        dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        width = _WIDTHS.get(dtype)
    except (KeyError, TypeError, ValueError):
        whole, width = False, None
    if not whole or (width is not None and end - begin != math.prod(shape) * width) or begin > end:
        raise CheckpointError(f"{path}: the header entry of tensor {name[:80]!r} is damaged; fetch the file again")
    if base + end > size:
        raise CheckpointError(
            f"{path}: truncated: tensor {name[:80]!r} ends at byte {base + end}, the file has {size}; fetch it again"
        )
    return Entry(path, dtype, shape, base + begin)


def readable(entry: Entry) -> bool:
    """Whether `read_rows` knows the number format."""
    return entry.dtype in _DTYPES
