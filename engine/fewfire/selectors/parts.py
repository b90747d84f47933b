"""The arrays and numbers that a `Selection` consists of, by name, and what each must be to fit a packed model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fewfire.packed import Packed
from fewfire.quantize import padded, row_bytes
from fewfire.selectors import codes
from fewfire.selectors.selection import COLUMNS, Columns, Predictor, Screen, Selection, column_shape

_PARTS: dict[str, type] = {"predictor": Predictor, "qkv": Columns, "o": Columns, "ffn": Columns, "screen": Screen}
_ROUTER = {"predictor.rows", "predictor.bias", "predictor.members"}
_ROWS = 4096  # stored rows of an array whose scales are checked


def flatten(selection: Selection) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and all else, each under a name such as "predictor.rows"."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(selection):
        value = getattr(selection, item.name)
        if item.name in _PARTS and value is not None:
            flat |= {f"{item.name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
        else:
            flat[item.name] = value
    arrays = {k: np.ascontiguousarray(v) for k, v in flat.items() if isinstance(v, np.ndarray)}
    numbers = {k: v.item() if isinstance(v, np.generic) else v for k, v in flat.items()}
    return arrays, {k: v for k, v in numbers.items() if k not in arrays and v is not None}


def unflatten(arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> Selection:
    flat: dict[str, Any] = {**arrays, **numbers}
    values = {k: v for k, v in flat.items() if "." not in k}
    for part, kind in _PARTS.items():
        inside = {k.partition(".")[2]: v for k, v in flat.items() if k.startswith(part + ".")}
        if inside:
            values[part] = kind(**inside)
    return Selection(**values)


def fitting(packed: Packed, selection: Selection) -> Selection:
    """The selection with all its arrays contiguous. Raises `ValueError` if it does not fit the model."""
    arrays, numbers = flatten(selection)
    if wrong := misfit(packed, arrays, numbers):
        raise ValueError(f"the selection does not fit the model: {wrong}")
    return unflatten(arrays, numbers)


def misfit(packed: Packed, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> str:
    """What is wrong with a selection for this model, in a few words; nothing if it fits."""
    try:
        expected = _expected(packed, arrays, numbers)
    except (KeyError, TypeError, ValueError, IndexError):
        return "a part of it is incomplete"
    if set(arrays) != set(expected):
        return f"its arrays are {', '.join(sorted(arrays)) or 'none'} and not {', '.join(sorted(expected))}"
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if array.dtype != dtype or array.shape != shape:
            return f"{name} is {array.dtype} {list(array.shape)} and not {np.dtype(dtype)} {list(shape)}"
        if dtype == np.float32 and np.isnan(array).any():
            return f"{name} has NaN"
        if name in ("screen.scales", "screen.bias") and not np.isfinite(array).all():
            return f"{name} has numbers that are not finite"
    neurons = packed.config.intermediate_size
    if "top" in arrays and "predictor.rows" in arrays:
        return "a predictor and the largest neurons exclude each other"
    if "ffn.columns" in arrays and {"top", "predictor.rows"} & set(arrays):
        return "gate and up by columns, and a choice of neurons before that, exclude each other"
    if numbers["trained"] and not (set(arrays) == {"top"} or set(arrays) == _ROUTER):
        return "a model can only have been trained with the largest neurons, or with a predictor without a basis"
    if "top" in arrays and not ((arrays["top"] >= 0) & (arrays["top"] <= neurons)).all():
        return f"top is not from 0 to {neurons}"
    if "predictor.members" in arrays and (np.sort(arrays["predictor.members"]) != np.arange(neurons)).any():
        return "predictor.members does not list every neuron once"
    for name, (weights, columns) in _formats(packed, numbers, arrays).items():
        if not _finite(arrays[name], weights, columns):
            return f"{name} has weights that are not finite"
    return ""


def _expected(
    packed: Packed, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Element type and shape of every array that the selection should have, given which parts it has."""
    c, layers, found = packed.config, packed.config.num_hidden_layers, dict[str, tuple[Any, tuple[int, ...]]]()
    if not isinstance(numbers["method"], str) or type(numbers["window"]) is not int or numbers["window"] < 1:
        raise ValueError("numbers")
    if type(numbers["trained"]) is not bool:
        raise ValueError("trained")
    parts = {name.partition(".")[0] for name in (*arrays, *numbers)} - {"method", "window", "trained"}
    for name in parts & {"gate", "down"}:
        found[name] = (np.float32, (layers, c.intermediate_size))
    if "top" in parts:
        found["top"] = (np.int32, (layers,))
    if "predictor" in parts:
        groups = arrays["predictor.bias"].shape[1]
        found["predictor.rows"] = (np.uint8, (layers, groups, 0))
        found["predictor.bias"] = (np.float32, (layers, groups))
        found["predictor.members"] = (np.int32, (layers, c.intermediate_size))
        if "predictor.basis" in arrays:
            found["predictor.basis"] = (np.uint8, (layers, arrays["predictor.basis"].shape[1], 0))
    for name in parts & set(COLUMNS):
        found[f"{name}.columns"] = (np.uint8, (layers, column_shape(c, name)[0], 0))
        found[f"{name}.thresholds"] = (np.float32, (layers, column_shape(c, name)[0]))
    if "screen" in parts:
        rank, margin = numbers["screen.rank"], numbers["screen.margin"]
        if type(rank) is not int or rank != codes.most_columns(rank):
            raise ValueError("screen")
        if not isinstance(margin, float) or math.isnan(margin):
            raise ValueError("screen")
        found["screen.codes"] = (np.uint8, (c.vocab_size, codes.row_bytes(rank)))
        found["screen.scales"] = (np.float32, (c.vocab_size,))
        found["screen.basis"] = (np.uint8, (rank, 0))
        found["screen.centre"] = (np.uint8, (1, 0))
        found["screen.bias"] = (np.float32, (c.vocab_size,))
    for name, (weights, columns) in _formats(packed, numbers, arrays).items():
        dtype, shape = found[name]
        found[name] = (dtype, (*shape[:-1], row_bytes(weights, columns)))
    return found


def _formats(
    packed: Packed, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, tuple[str, int]]:
    """The number format and the columns of every array of stored rows."""
    c, of = packed.config, packed.formats
    basis = arrays.get("predictor.basis")
    found = {
        "predictor.rows": (of.rows, c.hidden_size if basis is None else basis.shape[1]),
        "predictor.basis": (of.rows, c.hidden_size),
        "screen.basis": (of.table, c.hidden_size),
        "screen.centre": (of.table, c.hidden_size),
        **{f"{part}.columns": (of.down, column_shape(c, part)[1]) for part in COLUMNS},
    }
    return {name: form for name, form in found.items() if name in arrays}


def _finite(rows: np.ndarray, weights: str, columns: int) -> bool:
    """Whether the scales, or the weights themselves, of stored rows are finite; of many rows, in a sample."""
    rows = rows.reshape(-1, rows.shape[-1])
    rows = np.ascontiguousarray(rows[:: -(-len(rows) // _ROWS) or 1])
    n = padded(columns)
    if weights == "f32":
        return bool(np.isfinite(rows.view(np.float32)).all())
    if weights == "bf16":
        return bool(((rows.view(np.uint16) & 0x7F80) != 0x7F80).all())
    scales = np.ascontiguousarray(rows[:, n if weights == "q8" else n // 2 :])
    return bool(np.isfinite(scales.view(np.float16)).all())
