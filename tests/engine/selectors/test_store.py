"""A calibration on disk: whole or not there at all, and refused where it does not belong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fewfire import quantize
from fewfire.errors import CheckpointError, FewfireError
from fewfire.pack import pack
from fewfire.packed import Packed, open_packed
from fewfire.selectors import Columns, Predictor, Screen, Selection, codes, store
from fewfire.selectors.store import About
from fewfire.tensorfile import read_header

PackedPath = Callable[[str, str], Path]
ABOUT = About("gate", 0.5, {"gate": [0.5] * 3}, {"density": 0.5}, "own", 100, 0.01, 0.001, 0.009, 0.97, 50, 100, 1.5)


@pytest.fixture
def packed(own_packed: Callable[[str, str], Packed]) -> Packed:
    """A packed model of the test's own."""
    return own_packed("llama", "q4")


def gate(packed: Packed, value: float = 0.25) -> Selection:
    c = packed.config
    return Selection("gate", gate=np.full((c.num_hidden_layers, c.intermediate_size), value, np.float32))


def everything(packed: Packed) -> Selection:
    """A selection that has every part, of random contents."""
    c, of, random = packed.config, packed.formats, np.random.default_rng(0)
    layers, neurons, hidden = c.num_hidden_layers, c.intermediate_size, c.hidden_size

    def rows(weights: str, columns: int, *shape: int) -> np.ndarray:
        values = random.standard_normal((int(np.prod(shape)), columns)).astype(np.float32)
        return quantize.encode(values, weights, "dot").view(np.uint8).reshape(*shape, -1)

    def columns(inputs: int, outputs: int) -> Columns:
        return Columns(rows(of.down, outputs, layers, inputs), random.random((layers, inputs), np.float32))

    limits = random.random((layers, neurons), np.float32)
    limits[0, 0], limits[1, 1] = np.inf, -1
    members = np.stack([random.permutation(neurons) for _ in range(layers)]).astype(np.int32)
    predictor = Predictor(
        rows(of.rows, 64, layers, 12), random.random((layers, 12), np.float32), members,
        rows(of.rows, hidden, layers, 64),
    )  # fmt: skip
    coded = codes.encode(random.standard_normal((c.vocab_size, 64), np.float32))
    of_x = rows(of.table, hidden, 64), rows(of.table, hidden, 1)
    screen = Screen(*coded, *of_x, 64, np.zeros(c.vocab_size, np.float32), 2.5)
    return Selection(
        "everything", limits, limits[::-1].copy(), None, predictor,
        columns(hidden, c.head_dim * (c.num_attention_heads + 2 * c.num_key_value_heads)),
        columns(c.num_attention_heads * c.head_dim, hidden), None, 8, screen,
    )  # fmt: skip


def by_columns(packed: Packed) -> Selection:
    """What `everything` cannot have because it has a predictor: gate and up by columns."""
    c = packed.config
    values = np.random.default_rng(1).standard_normal((c.num_hidden_layers * c.hidden_size, 2 * c.intermediate_size))
    stored = quantize.encode(values.astype(np.float32), packed.formats.down, "axpy").view(np.uint8)
    shape = c.num_hidden_layers, c.hidden_size
    return Selection("ffn", ffn=Columns(stored.reshape(*shape, -1), np.full(shape, 0.1, np.float32)))


def flat(selection: Selection | None) -> dict[str, Any]:
    assert selection is not None
    out: dict[str, Any] = {}
    for name, value in dataclasses.asdict(selection).items():
        out |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return out


def same(a: Selection | None, b: Selection | None) -> bool:
    x, y = flat(a), flat(b)
    return x.keys() == y.keys() and all(np.array_equal(x[key], y[key]) for key in x)


def files(packed: Packed) -> list[str]:
    return sorted(name for name in os.listdir(packed.path) if "selectors" in name)


def refused(packed: Packed, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        store.load(packed)
    assert "\n" not in str(error.value)
    for word in (str(packed.path), "fewfire calibrate", "--dense", "delete", *words):
        assert word in str(error.value)


def test_none(packed: Packed) -> None:
    assert store.load(packed) is None
    assert store.about(packed) is None


@pytest.mark.parametrize("make", [gate, everything])
def test_comes_back(packed: Packed, make: Callable[[Packed], Selection]) -> None:
    saved = make(packed)
    assert store.save(packed, saved, ABOUT) == packed.path / store.NAME
    loaded = store.load(packed)
    assert same(saved, loaded)
    assert store.about(packed) == ABOUT
    assert len(files(packed)) == 2


@pytest.mark.parametrize("weights", quantize.FORMATS)
def test_every_format(own_packed: Callable[[str, str], Packed], weights: str) -> None:
    packed = own_packed("llama", weights)
    for saved in (everything(packed), by_columns(packed)):
        store.save(packed, saved, ABOUT)
        assert same(saved, store.load(packed))


def test_there_is_room_behind_every_array(packed: Packed) -> None:
    store.save(packed, everything(packed), ABOUT)
    (file,) = packed.path.glob("selectors-*")
    offsets = {name: entry.offset for name, entry in read_header(file).items()}
    assert max(offsets.values()) == offsets["~"] == file.stat().st_size - 4096


def test_it_is_removed(packed: Packed) -> None:
    before = files(packed)
    assert (store.disk_bytes(packed), store.remove(packed)) == (0, 0)
    store.save(packed, everything(packed), ABOUT)
    own = [packed.path / name for name in files(packed) if name not in before]
    assert len(own) == 2
    assert store.disk_bytes(packed) == sum(file.stat().st_size for file in own) == store.remove(packed)
    assert files(packed) == before
    assert store.load(packed) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 10000])
def test_a_damaged_one_is_removed(packed: Packed, content: bytes) -> None:
    store.save(packed, gate(packed), ABOUT)
    (packed.path / store.NAME).write_bytes(content)
    store.remove(packed)
    assert store.load(packed) is None


def test_one_that_cannot_be_removed(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(packed, gate(packed), ABOUT)
    before = files(packed)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(FewfireError, match=r"cannot remove .*selectors.json \(Permission denied\)"):
            store.remove(packed)
    assert files(packed) == before
    assert store.load(packed)


def test_the_next_one_replaces_it(packed: Packed) -> None:
    store.save(packed, gate(packed), ABOUT)
    before = files(packed)
    store.save(packed, gate(packed, 0.5), ABOUT)
    assert same(store.load(packed), gate(packed, 0.5))
    assert len(files(packed)) == 2
    assert files(packed) != before


# --- never a mixture --------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """As if the process were gone: nothing is cleaned up after it."""


@pytest.mark.parametrize("step", ["save_file", "_flush", "replace"])
def test_killed_while_writing(packed: Packed, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Whatever was written before, the old calibration is the one that is read; what is left goes some time later."""
    store.save(packed, gate(packed), ABOUT)

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(store.os if step == "replace" else store, step, killed)
        patch.setattr(store, "_remove", lambda *_: None)
        with pytest.raises(KilledError):
            store.save(packed, gate(packed, 0.5), ABOUT)
    assert same(store.load(packed), gate(packed))
    left = [packed.path / name for name in files(packed)]
    store.save(packed, gate(packed, 0.75), ABOUT)
    assert same(store.load(packed), gate(packed, 0.75))
    for path in left:
        if path.exists():
            os.utime(path, (0, time.time() - 7200))
    store.save(packed, gate(packed, 1.0), ABOUT)
    assert len(files(packed)) == 2


def test_interrupted_when_all_was_done(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def late(*args: Any) -> None:
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", late)
    with pytest.raises(KeyboardInterrupt):
        store.save(packed, gate(packed), ABOUT)
    assert same(store.load(packed), gate(packed))


@pytest.mark.parametrize("step", ["save_file", "replace"])
def test_a_disk_that_does_not_take_it(packed: Packed, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    store.save(packed, gate(packed), ABOUT)
    before = files(packed)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os if step == "replace" else store, step, full)
    with pytest.raises(FewfireError, match=r"cannot write .*No space left on device") as error:
        store.save(packed, gate(packed, 0.5), ABOUT)
    assert "\n" not in str(error.value)
    assert files(packed) == before
    assert same(store.load(packed), gate(packed))


def test_a_directory_that_cannot_be_written(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(FewfireError, match="Read-only file system"):
        store.check_writable(packed)


# --- refused ----------------------------------------------------------------------------------------------------------


def move(packed: Packed, path: Path) -> Packed:
    for name in files(packed):
        shutil.copy(packed.path / name, path / name)
    return open_packed(path)


def test_another_model(packed: Packed, packed_path: PackedPath, tmp_path: Path) -> None:
    store.save(packed, gate(packed), ABOUT)
    other = Path(shutil.copytree(packed_path("llama-relu", "q4"), tmp_path / "other"))
    refused(move(packed, other), "another model")


def test_an_edited_layer(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    """As after fine-tuning, or after editing a few weights of one layer: packed alike, but not the same model."""
    source = Path(shutil.copytree(tiny_path("llama"), tmp_path / "source"))
    packed = open_packed(pack(source, tmp_path / "packed", "f32", name="tiny"))
    store.save(packed, gate(packed), ABOUT)
    edited, name = load_file(source / "model.safetensors"), "model.layers.1.mlp.gate_proj.weight"
    middle = edited[name].size // 2
    edited[name].reshape(-1)[middle : middle + 16] += 1  # 64 bytes
    save_file(edited, source / "model.safetensors")
    refused(move(packed, pack(source, tmp_path / "other", "f32", name="tiny")), "another model")


def test_other_weights_of_the_same_shape(packed: Packed, tmp_path: Path) -> None:
    """Another file of weights where the description is the same."""
    store.save(packed, gate(packed), ABOUT)
    data = bytearray((packed.path / "weights.safetensors").read_bytes())
    gates = packed.arrays["gate"]
    at = data.index(gates.reshape(-1)[:256].tobytes())
    data[at : at + gates.nbytes] = gates.reshape(-1)[::-1].tobytes()
    other = Path(shutil.copytree(packed.path, tmp_path / "other"))
    (other / "weights.safetensors").write_bytes(data)
    refused(open_packed(other), "another model")


def test_another_format(packed: Packed, packed_path: PackedPath, tmp_path: Path) -> None:
    store.save(packed, gate(packed), ABOUT)
    other = Path(shutil.copytree(packed_path("llama", "q8"), tmp_path / "other"))
    refused(move(packed, other), "q4", "q8")


@pytest.mark.parametrize("what", ["VERSION", "_engine"])
def test_another_version(packed: Packed, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    store.save(packed, gate(packed), ABOUT)
    monkeypatch.setattr(store, what, 99 if what == "VERSION" else lambda: "99.0")
    refused(packed, "another version of fewfire")


def test_a_copy_of_the_model_keeps_it(packed: Packed, tmp_path: Path) -> None:
    store.save(packed, gate(packed), ABOUT)
    assert same(store.load(open_packed(Path(shutil.copytree(packed.path, tmp_path / "copy")))), gate(packed))


def test_damaged_tensors(packed: Packed) -> None:
    store.save(packed, everything(packed), ABOUT)
    (path,) = packed.path.glob("selectors-*")
    whole = path.read_bytes()
    limits = everything(packed).gate
    assert limits is not None
    flipped = whole.replace(limits.tobytes(), (limits + 1).tobytes(), 1)
    for content in (whole[:100], whole[:-5000], b"", b"\xff" * 200, flipped):
        path.write_bytes(content)
        refused(packed, "damaged")
    path.unlink()
    refused(packed, "missing")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"null", b"[" * 100_000])
def test_damaged_description(packed: Packed, content: bytes) -> None:
    store.save(packed, gate(packed), ABOUT)
    (packed.path / store.NAME).write_bytes(content)
    refused(packed, "damaged")


def test_edited_description(packed: Packed) -> None:
    store.save(packed, gate(packed), ABOUT)
    content = json.loads((packed.path / store.NAME).read_text())
    for key, value in (("tensors", "../weights.safetensors"), ("numbers", {}), ("about", {})):
        (packed.path / store.NAME).write_text(json.dumps(content | {key: value}))
        refused(packed, "damaged")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"gate": np.full((3, 96), np.nan, np.float32)}, "NaN"),
        ({"gate": np.zeros((3, 95), np.float32)}, "gate is"),
        ({"gate": np.zeros((3, 96))}, "float64"),
        ({"top": np.array([1, 2, 97], np.int32)}, "top"),
        ({"qkv": Columns(np.zeros((3, 64, 4), np.uint8), np.zeros((3, 64), np.float32))}, "qkv.columns"),
        ({"o": Columns(np.zeros((3, 64, 68), np.uint8), np.full((3, 64), np.nan, np.float32))}, "o.thresholds has NaN"),
        ({"o": Columns(np.full((3, 64, 68), 0xFF, np.uint8), np.zeros((3, 64), np.float32))}, "not finite"),
        ({"window": 0}, "incomplete"),
    ],
)
def test_a_selection_that_does_not_fit(packed: Packed, change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match="does not fit") as error:
        store.save(packed, dataclasses.replace(gate(packed), **change), ABOUT)
    assert word in str(error.value)
    assert files(packed) == []


def test_members_are_every_neuron(packed: Packed) -> None:
    selection = everything(packed)
    assert selection.predictor is not None
    members = selection.predictor.members.copy()
    members[0, 0] = members[0, 1]
    predictor = dataclasses.replace(selection.predictor, members=members)
    with pytest.raises(ValueError, match="every neuron once"):
        store.save(packed, dataclasses.replace(selection, predictor=predictor), ABOUT)
