"""An adapter: what training changed of a model, in a small file that is merged into it when it is packed.

A safetensors file. `layers.3.gate.A` (r, in) and `layers.3.gate.B` (out, r) mean W += B A for the matrix
`layers.3.gate.weight` (LoRA, 2106.09685, without a factor of its own). `layers.3.down.delta` and `layers.3.down.scale`
are what a matrix has gained as a whole, in few bits (`deltas.py`), by lines that are its rows, or, of a down matrix,
its columns: those of a neuron in either case. Any vector under its canonical name, such as `layers.3.ffn_norm.weight`
or `layers.3.act_threshold.weight`, takes the place of the model's. The bypass of centred activations is not in the
file: it follows from the centres and the model's own up and down matrices. The entry `fewfire` of its metadata is a
JSON object: "version", 2; "base", the model that it is for, by name; "digest", of that model's weights; "method", how
it was made; "config", the fields of `ModelConfig` that change; "about", whatever people should know.

Promises that an adapter for another model, with tensors that do not fit or with values that are no numbers is refused
in one line, before anything is packed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fewfire import deltas
from fewfire.checkpoint import Checkpoint, finite, row_range
from fewfire.config import ModelConfig
from fewfire.errors import CheckpointError
from fewfire.fields import Fields
from fewfire.tensorfile import Entry, read_header, read_integers, read_metadata, read_rows, readable

KEY, VERSION = "fewfire", 2
Shapes = Mapping[str, tuple[int, ...]]
DELTA = ".delta"
_BYPASS = ".bypass.weight"
CHANGES = ("hidden_act", "norm_relu", "ffn_bias")  # fields of a config that an adapter may change


@dataclass(frozen=True)
class Adapter:
    """An adapter's file, opened: its tensors' places and what it says about itself."""

    path: Path
    base: str
    digest: str
    method: str
    config: Mapping[str, Any]
    about: Mapping[str, Any]
    entries: Mapping[str, Entry]


def open_adapter(path: Path) -> Adapter:
    """Opens a file, whatever model it is for. Raises `CheckpointError`."""
    entries, text = read_header(path), read_metadata(path).get(KEY)
    if text is None:
        raise CheckpointError(f"{path}: no adapter: its metadata has no entry {KEY!r}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: the metadata is damaged; fetch the file again")
    fields = Fields(data, str(path))
    if data.get("version") != VERSION:
        raise fields.error("version", f"{VERSION} (another fewfire made it)")
    config, about = fields.section("config"), fields.section("about")
    changes, said = config.data if config else {}, about.data if about else {}
    if unknown := sorted(set(changes) - set(CHANGES)):
        raise CheckpointError(f"{path}: config: {unknown[0]} cannot be changed; only {', '.join(CHANGES)} can")
    for name, entry in entries.items():
        if not (readable(entry) or (name.endswith(DELTA) and entry.dtype == "U8")):
            raise CheckpointError(
                f"{path}: tensor {name} is stored as {entry.dtype}; supported: F32, F16, BF16, and U8 of deltas"
            )
    base, weights, method = (fields.text(name) for name in ("base", "digest", "method"))
    return Adapter(path, base, weights, method, changes, said, entries)


def digest(checkpoint: Checkpoint) -> str:
    """Tells models apart by their weights, whatever files these are in: by all vectors, and each matrix's first row."""
    found = hashlib.sha256()
    for name, shape in checkpoint.config.shapes().items():
        found.update(f"{name} {shape} ".encode())
        found.update(checkpoint.read(name, 0, 1 if len(shape) > 1 else None).tobytes())
    return found.hexdigest()[:16]


class Adapted:
    """A checkpoint with an adapter merged into it."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        """Raises `CheckpointError` if the adapter is for another model, or is damaged."""
        self._checkpoint, self._adapter, self.path = checkpoint, adapter, checkpoint.path
        if digest(checkpoint) != adapter.digest:
            raise CheckpointError(
                f"{adapter.path}: made for {adapter.base[:80]}, and the weights of {checkpoint.path} are others"
            )
        self.config = _changed(checkpoint.config, adapter)
        self._low_rank, self._deltas = _check_tensors(checkpoint.config, self.config, adapter)
        for name, entry in adapter.entries.items():  # so that nothing damaged shows halfway through
            if not name.endswith(DELTA):
                self._tensor(name, 0, entry.shape[0])
        for name in self._deltas:
            self.read(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Checkpoint.read`."""
        shape = self.config.shapes()[name]
        start, stop = row_range(name, shape[0], start, stop)
        if name in self._adapter.entries:
            return self._tensor(name, start, stop)
        if self._derived(name):
            return self._bypass(name.removesuffix(_BYPASS), start, stop)
        rows = self._checkpoint.read(name, start, stop)
        if name in self._low_rank:
            part = name.removesuffix(".weight")
            rank = self._adapter.entries[f"{part}.A"].shape[0]
            rows = rows + self._tensor(f"{part}.B", start, stop) @ self._tensor(f"{part}.A", 0, rank)
        if name in self._deltas:
            with np.errstate(over="ignore"):
                rows = finite(rows + self._delta(name, start, stop), name, self._adapter.path)
        return rows

    def tokenizer_json(self) -> str:
        """See `Checkpoint.tokenizer_json`."""
        return self._checkpoint.tokenizer_json()

    def chat_template(self) -> str | None:
        """See `Checkpoint.chat_template`."""
        return self._checkpoint.chat_template()

    def _derived(self, name: str) -> bool:
        """Whether a tensor is in neither file, but follows from what is there."""
        return name.endswith(_BYPASS) and name not in self._checkpoint.config.shapes()

    def _bypass(self, at: str, start: int, stop: int) -> np.ndarray:
        """Rows of down diag(centre) up, of the model's own matrices; `at` is the layer, as in "layers.3"."""
        centre = self._tensor(f"{at}.act_centre.weight", 0, self.config.intermediate_size)
        with np.errstate(over="ignore", invalid="ignore"):
            rows = (self._checkpoint.read(f"{at}.down.weight", start, stop) * centre) @ self._checkpoint.read(
                f"{at}.up.weight"
            )
        return finite(rows, f"{at}{_BYPASS}", self._adapter.path)

    def _delta(self, name: str, start: int, stop: int) -> np.ndarray:
        """What these rows of a matrix gain, `(stop - start, in)`."""
        part, (out, into) = name.removesuffix(".weight"), self.config.shapes()[name]
        packed = read_integers(self._adapter.entries[part + DELTA], "U8")
        scales = self._tensor(f"{part}.scale", 0, into if _by_column(name) else out)
        try:
            if _by_column(name):
                return deltas.decode(packed, scales, out).T[start:stop]
            return deltas.decode(packed, scales, into)[start:stop]
        except ValueError as error:
            raise CheckpointError(f"{self._adapter.path}: {part} is damaged ({error}); fetch the file again") from None

    def _tensor(self, name: str, start: int, stop: int) -> np.ndarray:
        return finite(read_rows(self._adapter.entries[name], start, stop), name, self._adapter.path)


def save(
    path: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, np.ndarray],
    *,
    base: str,
    method: str,
    config: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Adapter:
    """Writes an adapter for a checkpoint: low-rank matrices in float16, deltas in few bits, vectors in float32.

    tensors: under their names in the file, a delta as the matrix `(out, in)` that it is; config: the fields that
    change; base, method, about: see the module. Raises `CheckpointError` if what was written could not be merged, and
    then leaves nothing, or what was there before.
    """
    with np.errstate(over="ignore"):
        whole = {k: v for k, v in tensors.items() if k.endswith(DELTA)}
        stored = {
            k: np.ascontiguousarray(v, np.float16 if v.ndim > 1 else np.float32)
            for k, v in tensors.items()
            if k not in whole
        }
    for name, delta in whole.items():
        part = name.removesuffix(DELTA)
        lines = finite(delta.T if _by_column(part) else delta, name, path)
        stored[name], stored[f"{part}.scale"] = deltas.encode(lines)
    said = {"version": VERSION, "base": base, "digest": digest(checkpoint), "method": method}
    text = json.dumps({**said, "config": dict(config), "about": dict(about)})
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        save_file(stored, temporary, metadata={KEY: text})
        Adapted(checkpoint, open_adapter(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return open_adapter(path)


def _changed(config: ModelConfig, adapter: Adapter) -> ModelConfig:
    """The config with the adapter's changes. Raises `CheckpointError`."""
    fields = Fields(adapter.config, f"{adapter.path}: config")
    changes: dict[str, Any] = {}
    if "hidden_act" in fields:
        changes["hidden_act"] = fields.text("hidden_act")
    for name in ("norm_relu", "ffn_bias"):
        if name in fields:
            changes[name] = fields.flag(name, False)
    changed = replace(config, **changes)
    try:
        changed.check()
    except ValueError as error:
        raise CheckpointError(f"{adapter.path}: config: {error}") from None
    return changed


def _by_column(name: str) -> bool:
    """Whether a delta's lines are the columns of a matrix."""
    return name.removesuffix(".weight").endswith(".down")


def _check_tensors(before: ModelConfig, after: ModelConfig, adapter: Adapter) -> tuple[set[str], set[str]]:
    """The matrices that gain something of low rank, and those that gain it as a whole, by name.

    Raises `CheckpointError` for tensors that do not fit, and for missing ones.
    """
    old, new, found = before.shapes(), after.shapes(), adapter.entries
    whole = {f"{name.removesuffix(DELTA)}.weight" for name in found if name.endswith(DELTA)}
    low_rank = {f"{name[:-2]}.weight" for name in found if name.endswith((".A", ".B"))}
    expected = {name: new[name] for name in found if name in new and len(new[name]) == 1}
    for name in sorted(low_rank):
        part = name.removesuffix(".weight")
        pair = [found.get(f"{part}.A"), found.get(f"{part}.B")]
        _check_matrix(name, old, new, adapter)
        if pair[0] is None or pair[1] is None:
            raise CheckpointError(f"{adapter.path}: {part} has one of the tensors A and B, not both")
        rank = pair[0].shape[0] if pair[0].shape else 0
        expected |= {f"{part}.A": (rank, new[name][1]), f"{part}.B": (new[name][0], rank)}
    for name in sorted(whole):
        part = name.removesuffix(".weight")
        _check_matrix(name, old, new, adapter)
        lines = new[name][1] if _by_column(name) else new[name][0]
        size = math.prod(found[f"{part}{DELTA}"].shape)  # of compressed bytes: any, so long as they come in one row
        expected |= {f"{part}{DELTA}": (size,), f"{part}.scale": (lines,)}
        if f"{part}.scale" not in found:
            raise CheckpointError(f"{adapter.path}: {part} has a delta without a scale")
    for name, entry in found.items():
        if name not in expected:
            raise CheckpointError(f"{adapter.path}: tensor {name} is none that {adapter.base[:80]} could have")
        if entry.shape != expected[name]:
            raise CheckpointError(
                f"{adapter.path}: tensor {name} has shape {entry.shape}, the model asks for {expected[name]}"
            )
    if missing := [name for name in new if name not in old and name not in found and not name.endswith(_BYPASS)]:
        raise CheckpointError(f"{adapter.path}: tensor {missing[0]} is missing, which its config asks for")
    return low_rank, whole


def _check_matrix(name: str, old: Shapes, new: Shapes, adapter: Adapter) -> None:
    if len(new.get(name, ())) != 2 or len(old.get(name, ())) != 2:
        raise CheckpointError(f"{adapter.path}: {name.removesuffix('.weight')} is no matrix of {adapter.base[:80]}")
