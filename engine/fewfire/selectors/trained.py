"""The selection that a model was trained with, as its checkpoint describes it: `sparsity.json` next to config.json.

    {"version": 1, "method": "topk", "k": [neurons kept in layer 0, ...]}
    {"version": 1, "method": "router"}

Top-K keeps the k neurons of a layer with the largest |act(gate)| (The Lazy Neuron Phenomenon, 2210.06313). A router
(Learn To be Efficient, 2402.06126) has its weights in `sparsity.safetensors`: `layers.{i}.router.weight` (groups,
hidden) and `.bias` (groups,), and `.members` (neurons,) int32, which lists the neurons group by group; all groups but
the last have ceil(neurons / groups). A group is read if weight . x + bias is over 0, x being the FFN's normed input; a
layer without a router is dense.

Thresholds of the activation function are no selection but weights of the model (`config.THRESHOLDED`). Promises that
what it returns fits the model, and a `CheckpointError` of one line for anything else.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from fewfire.checkpoint import read_json
from fewfire.config import ModelConfig
from fewfire.errors import CheckpointError
from fewfire.fields import Fields
from fewfire.packed import Packed
from fewfire.quantize import encode
from fewfire.selectors.selection import Predictor, Selection
from fewfire.tensorfile import Entry, read_header, read_integers, read_rows, readable

NAME, TENSORS = "sparsity.json", "sparsity.safetensors"
_METHODS = ("topk", "router")


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What a description says, before a router is stored in a model's number format."""

    method: str
    top: np.ndarray | None = None  # (layers,) int32
    weight: np.ndarray | None = None  # (layers, groups, hidden) float32
    bias: np.ndarray | None = None  # (layers, groups) float32, +inf throughout a layer that is dense
    members: np.ndarray | None = None  # (layers, neurons) int32

    def selection(self, packed: Packed) -> Selection:
        """For a packed model, which prefill applies as well."""
        if self.weight is None or self.bias is None or self.members is None:
            return Selection(self.method, top=self.top, trained=True)
        layers, groups, hidden = self.weight.shape
        rows = encode(self.weight.reshape(-1, hidden), packed.formats.rows, "dot").view(np.uint8)
        predictor = Predictor(rows.reshape(layers, groups, -1), self.bias, self.members)
        return Selection(self.method, predictor=predictor, trained=True)


def read(directory: Path, config: ModelConfig) -> Trained | None:
    """The description of a checkpoint, None if it has none. Raises `CheckpointError`."""
    path = directory / NAME
    if not path.is_file():
        return None
    fields = Fields(read_json(path)[1], str(path))
    if fields.data.get("version") != 1:
        raise fields.error("version", "1 (a newer fewfire may know it)")
    method = fields.text("method")
    if method not in _METHODS:
        raise fields.error("method", " or ".join(_METHODS))
    return _router(directory / TENSORS, config) if method == "router" else _top(fields, config)


def _top(fields: Fields, config: ModelConfig) -> Trained:
    listed = fields.items("k", config.num_hidden_layers)
    if listed is None:
        raise fields.error("k", f"a list of {config.num_hidden_layers} entries")
    each = Fields({f"k[{i}]": value for i, value in enumerate(listed)}, fields.where)
    kept = [each.whole(name, 1, config.intermediate_size) for name in each]
    return Trained("topk", top=np.array(kept, np.int32))


def _router(path: Path, config: ModelConfig) -> Trained:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing, which {NAME} refers to")
    entries, layers, neurons = read_header(path), config.num_hidden_layers, config.intermediate_size
    sizes = {entry.shape[:1] for name, entry in entries.items() if name.endswith(".router.weight")}
    if len(sizes) != 1 or not 0 < (groups := next(iter(sizes))[0]) <= neurons:
        raise CheckpointError(f"{path}: the routers of all layers must have as many groups, from 1 to {neurons}")
    shapes = {"weight": (groups, config.hidden_size), "bias": (groups,), "members": (neurons,)}
    known = {f"layers.{i}.router.{part}" for i in range(layers) for part in shapes}
    if unknown := sorted(set(entries) - known):
        raise CheckpointError(f"{path}: tensor {unknown[0]} is none of a model with {layers} layers")
    found: dict[str, Any] = {
        "weight": np.zeros((layers, *shapes["weight"]), np.float32),
        "bias": np.full((layers, groups), np.inf, np.float32),
        "members": np.tile(np.arange(neurons, dtype=np.int32), (layers, 1)),
    }
    for layer in range(layers):
        parts = {part: entries.get(f"layers.{layer}.router.{part}") for part in shapes}
        if any(parts.values()):
            for part, entry in parts.items():
                found[part][layer] = _tensor(path, f"layers.{layer}.router.{part}", entry, shapes[part])
    wrong = (np.sort(found["members"]) != np.arange(neurons)).any(axis=1)
    if wrong.any():
        raise CheckpointError(f"{path}: layers.{wrong.argmax()}.router.members does not list every neuron once")
    return Trained("router", **found)


def _tensor(path: Path, name: str, entry: Entry | None, shape: tuple[int, ...]) -> np.ndarray:
    if entry is None:
        raise CheckpointError(f"{path}: tensor {name} is missing: the router is incomplete")
    if entry.shape != shape:
        raise CheckpointError(f"{path}: tensor {name} has shape {entry.shape}, the config asks for {shape}")
    if name.endswith(".members"):
        return read_integers(entry)
    if not readable(entry):
        raise CheckpointError(f"{path}: tensor {name} is stored as {entry.dtype}; supported: F32, F16, BF16")
    values = read_rows(entry, 0, shape[0])
    if not np.isfinite(values).all():
        raise CheckpointError(f"{path}: tensor {name} has NaN or infinite weights: the file is damaged")
    return values
