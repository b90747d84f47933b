"""The records of a model's layers: where their weights are, and what a selection leaves out of them."""

from __future__ import annotations

import numpy as np

from fewfire.buffers import Buffers
from fewfire.config import EXACT_ZEROS
from fewfire.kernels.layer import LAYER
from fewfire.packed import Packed
from fewfire.selectors.selection import COLUMNS, Predictor, Selection


def layer_records(packed: Packed, selection: Selection | None, dense: bool) -> Buffers:
    """One record per layer. Exact zeros are dropped without a selection, too, unless it is to be `dense`."""
    c, arrays, count = packed.config, packed.arrays, packed.config.num_hidden_layers
    layers = Buffers(LAYER)
    layers.record = np.zeros(count, LAYER)
    for name in LAYER.fields or ():
        if name in arrays:
            layers.point_each(name, arrays[name])
    layers.record["window"] = [c.window(i) for i in range(count)]
    layers.record["local"] = layers.record["window"] > 0 if c.rope_local else 0
    layers.point("active", np.arange(c.intermediate_size, dtype=np.int32))
    layers.record["top"] = -1
    if c.hidden_act in EXACT_ZEROS and not dense:
        layers.point("gate_least", np.zeros(c.intermediate_size, np.float32))
    if selection:
        _select(layers, selection, c.intermediate_size)
    return layers


def _select(layers: Buffers, selection: Selection, neurons: int) -> None:
    """Points to what drops neurons. A layer that keeps everything is not tested, and gives the same bits as dense."""
    for name in ("gate", "down"):
        least = getattr(selection, name)
        if least is not None:
            layers.point_each(f"{name}_least", least)
            layers.record[f"{name}_least"][(least < 0).all(axis=1)] = 0
    if selection.top is not None:
        layers.record["top"] = np.where(selection.top < neurons, selection.top, -1)
    for name in COLUMNS:
        part = getattr(selection, name)
        if part is not None:
            used = (part.thresholds >= 0).any(axis=1)
            layers.point_each(f"{name}_columns", part.columns, used)
            layers.point_each(f"{name}_least", part.thresholds, used)
    if selection.predictor:
        _predict(layers, selection.predictor)


def _predict(layers: Buffers, predictor: Predictor) -> None:
    used = ~np.isposinf(predictor.bias).all(axis=1)
    parts = {"predictor": predictor.rows, "predictor_bias": predictor.bias, "active": predictor.members}
    numbers = {"predictor_stride": predictor.rows.strides[1], "group_size": predictor.group_size}
    numbers["groups"] = predictor.bias.shape[1]
    if predictor.basis is not None:
        parts["basis"] = predictor.basis
        numbers |= {"rank": predictor.basis.shape[1], "basis_stride": predictor.basis.strides[1]}
    for name, array in parts.items():
        layers.point_each(name, array, used)
    for name, number in numbers.items():
        layers.record[name] = np.where(used, number, 0)
