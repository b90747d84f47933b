"""Which steps are compiled: those that the kernels call for a selection, and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from decoding import decoded
from fewfire.kernels.compile import Compiled
from fewfire.kernels.layer import LAYER
from fewfire.model import Model
from fewfire.packed import open_packed
from fewfire.selectors import Selection
from fewfire.selectors.steps import steps

PackedPath = Callable[[str, str], Path]
COLUMNS = {"column_chunk", "join_chunks"}


def records(**fields: int) -> np.ndarray:
    """Of two layers, the second of which has these fields."""
    layers = np.zeros(2, LAYER)
    layers["top"] = -1
    for name, value in fields.items():
        layers[name][1] = value
    return layers


@pytest.mark.parametrize(
    ("fields", "called"),
    [
        ({}, set()),
        ({"gate": 1, "active": 1, "window": 1, "act_threshold": 1}, set()),
        ({"gate_least": 1}, {"keep"}),
        ({"down_least": 1}, {"keep", "scatter_kept"}),
        ({"top": 0}, {"keep", "find_top"}),
        ({"predictor": 1}, {"predict"}),
        ({"predictor": 1, "basis": 1}, {"predict", "reduce"}),
        ({"qkv_columns": 1}, COLUMNS),
        ({"o_columns": 1}, COLUMNS),
        ({"ffn_columns": 1}, COLUMNS | {"all_gates"}),
    ],
)
def test_what_a_layer_asks_for(fields: dict[str, int], called: set[str]) -> None:
    assert set(steps(records(**fields), screened=False, trained=False)) == called


def test_what_a_model_asks_for() -> None:
    assert set(steps(records(), screened=True, trained=False)) == {"screened_logits", "dot_codes"}
    assert set(steps(records(), screened=False, trained=True)) == {"leave_out"}


@pytest.mark.parametrize(("family", "exact"), [("llama", set()), ("llama-fatsilu", {"keep"}), ("llama-relu", {"keep"})])
def test_only_that_is_compiled(
    family: str, exact: set[str], packed_path: PackedPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    compiled = Compiled.compile

    def noted(self: Compiled) -> Any:
        asked.add(self.__name__)
        return compiled(self)

    monkeypatch.setattr(Compiled, "compile", noted)
    every = set(steps(records(**dict.fromkeys(LAYER.names or (), 1)), screened=True, trained=True))

    def used(selection: Selection | None, dense: bool = False) -> set[str]:
        asked.clear()
        model.engine.select(selection, dense)
        return asked & every

    model = Model(open_packed(packed_path(family, "q4")), 1)
    assert asked & every == exact
    shape = model.packed.config.num_hidden_layers, model.packed.config.intermediate_size
    assert used(None, dense=True) == set()
    dense = decoded(model, tiny.prompt(5))
    assert used(Selection("down", down=np.full(shape, 0.1, np.float32)), dense=True) == {"keep", "scatter_kept"}
    assert (decoded(model, tiny.prompt(5)) != dense).any()
    assert used(Selection("down", down=np.full(shape, -1, np.float32)), dense=True) == set()
    np.testing.assert_array_equal(decoded(model, tiny.prompt(5)), dense)
