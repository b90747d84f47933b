"""Packed models: mapped without a copy, readable by others, and refused in one line when they are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from fewfire import packed
from fewfire.config import ModelConfig
from fewfire.errors import CheckpointError
from fewfire.packed import DESCRIPTION, PAGE, VERSION, WEIGHTS, is_packed, open_packed
from fewfire.quantize import FORMATS, row_bytes
from tiny import FAMILIES


@pytest.fixture
def model(packed_path: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A packed model that a test may damage."""
    return Path(shutil.copytree(packed_path("gemma3", "q8"), tmp_path / "model"))


def refused(path: Path, *words: str) -> str:
    """Opening it fails in one line that names the directory, the words and what to do."""
    with pytest.raises(CheckpointError) as caught:
        open_packed(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), "pack it again", *words):
        assert word in message
    return message


def change(path: Path, alter: Callable[[dict[str, Any]], object]) -> None:
    description = json.loads((path / DESCRIPTION).read_text())
    alter(description)
    (path / DESCRIPTION).write_text(json.dumps(description))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_arrays(family: str, weights: str, packed_path: Callable[[str, str], Path]) -> None:
    """Views of the map, each at the beginning of a page, and the same as the safetensors library sees."""
    opened = open_packed(packed_path(family, weights))
    assert opened.weights == weights
    assert opened.config.hidden_size == 64
    expected = packed.arrays(opened.config, weights)
    assert {n: (a.shape, a.dtype) for n, a in opened.arrays.items()} == {
        n: (a.shape, a.dtype) for n, a in expected.items()
    }
    with safetensors.safe_open(opened.path / WEIGHTS, "numpy") as file:
        names = [name for name in file.keys() if not name.startswith("padding.")]  # noqa: SIM118, not a dict
        assert sorted(names) == sorted(opened.arrays)
        for name in names:
            np.testing.assert_array_equal(file.get_tensor(name), opened.arrays[name])
    for array in opened.arrays.values():
        assert array.ctypes.data % PAGE == 0
        assert array.flags.c_contiguous
        assert not array.flags.writeable
        assert not array.flags.owndata


def test_parts(packed_path: Callable[[str, str], Path]) -> None:
    opened = open_packed(packed_path("llama", "q4"))
    parts = opened.parts()
    assert sum(parts.values()) == sum(a.nbytes for a in opened.arrays.values())
    assert parts["head"] == parts["embed"] == opened.arrays["embed"].nbytes
    assert parts["norms"] == 4 * 64 * (2 * 3 + 1)
    assert open_packed(packed_path("llama-tied", "q4")).parts()["head"] == 0
    assert open_packed(packed_path("opt", "f32")).parts()["embed"] == 4 * 64 * (300 + 160)


def test_a_bypass_counts_as_ffn_and_is_read_by_every_token(packed_path: Callable[[str, str], Path]) -> None:
    plain, centred = (open_packed(packed_path(family, "q4")) for family in ("llama-fatsilu", "llama-centred"))
    rows = 3 * 64 * row_bytes("q8", 64)  # as the tables
    assert centred.bytes_per_token() - plain.bytes_per_token() == rows
    assert centred.parts() == plain.parts() | {"ffn": plain.parts()["ffn"] + rows + 4 * 3 * 96}


def test_is_packed(model: Path, tmp_path: Path) -> None:
    assert is_packed(model)
    assert not is_packed(tmp_path)
    assert not is_packed(model / DESCRIPTION)
    assert not is_packed(tmp_path / "nothing")


def test_weights_that_end_too_early(model: Path) -> None:
    whole = (model / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for cut in (0, 1, 7, 8, 100, header - 1, header, header + 1, len(whole) // 2, len(whole) - PAGE, len(whole) - 5000):
        (model / WEIGHTS).write_bytes(whole[:cut])
        refused(model, WEIGHTS)
    (model / WEIGHTS).write_bytes(whole)
    open_packed(model)


def test_missing_files(model: Path, tmp_path: Path) -> None:
    (model / WEIGHTS).unlink()
    refused(model, "No such file")
    (model / WEIGHTS).mkdir()
    refused(model)
    refused(tmp_path / "nothing", "No such file")


def test_a_header_of_another_model(model: Path, packed_path: Callable[[str, str], Path]) -> None:
    shutil.copy(packed_path("gemma3", "q4") / WEIGHTS, model / WEIGHTS)
    refused(model, "header", WEIGHTS)


def test_a_header_that_claims_absurd_sizes(model: Path) -> None:
    with (model / WEIGHTS).open("r+b") as file:
        file.write((1 << 60).to_bytes(8, "little"))
    refused(model, "header")


def test_another_version(model: Path) -> None:
    change(model, lambda d: d.update(version=VERSION + 1))
    refused(model, f"another version of fewfire ({VERSION + 1}, not {VERSION})")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", "\xff", "[" * 100_000, '{"version": 1e999}'])
def test_a_description_that_is_not_one(model: Path, content: str) -> None:
    (model / DESCRIPTION).write_bytes(content.encode("latin-1"))
    refused(model)


def test_a_description_cut_anywhere(model: Path) -> None:
    whole = (model / DESCRIPTION).read_bytes()
    for cut in range(0, len(whole.rstrip()), 7):
        (model / DESCRIPTION).write_bytes(whole[:cut])
        refused(model, DESCRIPTION)


@pytest.mark.parametrize("field", ["version", "name", "weights", "config", "contents"])
def test_a_missing_field(model: Path, field: str) -> None:
    change(model, lambda d: d.pop(field))
    refused(model)


ODD = (None, True, "x", -1, 0, 7, 10**30, 0.5, [], {}, [None], {"a": 1})


@pytest.mark.parametrize("field", [f.name for f in fields(ModelConfig)])
def test_a_damaged_config(model: Path, field: str) -> None:
    """Whatever a field says instead: refused, or harmless."""
    before = json.loads((model / DESCRIPTION).read_text())["config"][field]
    for odd in ODD:
        if odd == before:
            continue

        def damage(description: dict[str, Any], value: Any = odd) -> None:
            description["config"][field] = value

        change(model, damage)
        refused(model, DESCRIPTION)
