"""What parts of a model choose from: bytes that add up to the model's, and nothing that another setting beats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fewfire.packed import Packed, open_packed
from fewfire.quantize import row_bytes
from fewfire.selectors.choices import choices, governed_bytes
from fewfire.selectors.fits import Fit
from fewfire.selectors.methods import KINDS, Kind
from fewfire.spread import Choice

PackedPath = Callable[[str, str], Path]
PREDICTOR = SimpleNamespace(
    rows=np.zeros((3, 10, 20), np.uint8),
    bias=np.zeros((3, 10), np.float32),
    basis=np.zeros((3, 4, 5), np.uint8),
    members=np.zeros((3, 96), np.int32),
)
ADDED = 10 * 20 + 4 * 10 + 4 * 5 + 4 * 96  # bytes that it has in a layer
SCREEN = SimpleNamespace(codes=np.zeros((300, 2), np.uint8), bias=np.zeros(300, np.float32), rank=2, margin=1.5)


@pytest.fixture(autouse=True)
def every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {
        "lowrank": Kind("predictor", "ffn", lambda *_: {}, lambda *_: PREDICTOR, "down"),
        "screen": Kind("screen", "head", lambda *_: {}, lambda *_: SCREEN, None),
    }
    for name in ("qkv", "o", "ffn"):
        kinds[name] = Kind(name, name, lambda *_: {}, lambda *_: None, "down")
    for name, kind in kinds.items():
        monkeypatch.setitem(KINDS, name, kind)


@pytest.fixture(params=["llama", "opt", "gemma3"])
def packed(packed_path: PackedPath, request: pytest.FixtureRequest) -> Packed:
    return open_packed(packed_path(request.param, "q4"))


def fits(packed: Packed, *kinds: str) -> dict[str, list[Fit]]:
    densities = np.array([0.1, 0.5, 0.9, 1.0])
    return {
        kind: [{"densities": densities, "errors": (1 - densities) ** 2}]
        * (1 if KINDS[kind].part == "head" else packed.config.num_hidden_layers)
        for kind in kinds
    }


def weights(packed: Packed, *kinds: str) -> dict[str, list[float]]:
    return {kind: [1.0 + i for i in range(len(found))] for kind, found in fits(packed, *kinds).items()}


def in_bytes_of(packed: Packed, *kinds: str) -> list[Choice]:
    found = fits(packed, *kinds)
    return choices(packed, found, weights(packed, *kinds))


@pytest.mark.parametrize(
    "kinds",
    [("down",), ("gate", "down"), ("top",), ("lowrank", "gate", "down"), ("qkv", "o", "ffn", "down"), ("screen", "o")],
)
def test_everything_kept_is_everything_governed(packed: Packed, kinds: tuple[str, ...]) -> None:
    found = in_bytes_of(packed, *kinds)
    assert sum(choice.cost[0] for choice in found) == governed_bytes(packed, kinds)
    for choice in found:
        assert choice.damage[0] == 0
        assert set(choice.settings[0].values()) == {1.0}
        assert (np.diff(choice.cost) < 0).all()
        assert (np.diff(choice.damage) > 0).all()
        assert len(choice.settings) == len(choice.cost)


def test_all_that_a_model_reads_is_governed_by_somebody(packed: Packed) -> None:
    row = packed.arrays["embed"].shape[2]
    assert governed_bytes(packed, ("qkv", "o", "lowrank", "screen")) == packed.bytes_per_token() - row


def test_tests_of_a_neuron_come_one_after_the_other(packed: Packed) -> None:
    kinds = ("lowrank", "gate", "down")
    c, of = packed.config, packed.formats
    row, down = row_bytes(of.rows, c.hidden_size), row_bytes(of.down, c.hidden_size)
    up, n = row if c.gated else 0, c.intermediate_size
    for choice in in_bytes_of(packed, *kinds):
        for read, s in zip(choice.cost, choice.settings, strict=True):
            fired = min(s["lowrank"], s["gate"])
            wanted = n * (row * s["lowrank"] + up * fired + down * min(fired, s["down"]))
            thresholds = 4 * n * ((s["gate"] < 1) + (s["down"] < 1))
            assert read == pytest.approx(wanted + thresholds + (ADDED if s["lowrank"] < 1 else 0))


def test_columns_are_chosen_only_where_they_are_fewer_bytes(packed: Packed) -> None:
    c = packed.config
    queries = c.num_attention_heads * c.head_dim
    column = row_bytes(packed.formats.down, c.hidden_size)
    rows = c.hidden_size * row_bytes(packed.formats.rows, queries)
    for choice in in_bytes_of(packed, "o"):
        assert choice.cost[0] == rows
        for read, setting in list(zip(choice.cost, choice.settings, strict=True))[1:]:
            assert read == pytest.approx(queries * (column * setting["o"] + 4))
            assert read < rows


def test_the_head_has_its_screen_to_pay_for(packed: Packed) -> None:
    head = packed.arrays.get("head", packed.arrays["embed"]).nbytes
    (choice,) = in_bytes_of(packed, "screen")
    for read, damage, setting in list(zip(choice.cost, choice.damage, choice.settings, strict=True))[1:]:
        assert read == pytest.approx(head * setting["screen"] + 300 * (2 + 4))
        assert damage == pytest.approx(np.interp(setting["screen"], [0.1, 0.5, 0.9, 1.0], [0.81, 0.25, 0.01, 0.0]))


@pytest.mark.parametrize(("other", "share"), [("gate", 0.5), ("lowrank", 0.5), ("ffn", 1.0)])
def test_what_two_tests_drop_is_not_lost_twice(packed: Packed, other: str, share: float) -> None:
    """Of the lesser damage half counts, but all of it beside columns, which are no test of neurons."""
    found = fits(packed, other, "down")
    found["down"] = [{**fit, "errors": fit["errors"] / 20} for fit in found["down"]]  # else it is worth nothing
    for layer, choice in enumerate(choices(packed, found, weights(packed, other, "down"))):
        for damage, s in zip(choice.damage, choice.settings, strict=True):
            both = np.array([np.interp(s[k], fit[0]["densities"], fit[0]["errors"]) for k, fit in found.items()])
            assert damage == pytest.approx((1 + layer) * (both.max() + share * both.min()))
        if packed.config.gated:  # else both are about the same rows
            assert any(s[other] < 1 and s["down"] < 1 for s in choice.settings)


def test_zeros_cost_nothing_at_any_density(packed: Packed) -> None:
    """Where a share of neurons is exactly zero, a predictor that keeps more than fires reads no more of up and down."""
    c, of = packed.config, packed.formats
    row, down = row_bytes(of.rows, c.hidden_size), row_bytes(of.down, c.hidden_size)
    found = fits(packed, "lowrank")
    for fit in found["lowrank"]:
        fit["firing"] = np.array(0.3)
    for choice in choices(packed, found, weights(packed, "lowrank")):
        for cost, s in zip(choice.cost, choice.settings, strict=True):
            fired = min(s["lowrank"], 0.3)
            wanted = c.intermediate_size * (row * s["lowrank"] + (row if c.gated else 0) * fired + down * fired)
            assert cost == pytest.approx(wanted + (ADDED if s["lowrank"] < 1 else 0))
