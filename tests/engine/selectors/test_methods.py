"""Methods by name: what they consist of, and what does not go together."""

from __future__ import annotations

import numpy as np
import pytest

from fewfire.selectors import methods
from fewfire.selectors.methods import KINDS, METHODS, Kind, Method, parse


@pytest.fixture(autouse=True)
def every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds and methods that do not depend on how they are fitted."""
    parts = {"lowrank": "predictor", "router": "predictor", "qkv": "qkv", "o": "o", "ffn": "ffn", "screen": "screen"}
    for name, field in parts.items():
        part = {"screen": "head", "qkv": "qkv", "o": "o"}.get(field, "ffn")
        monkeypatch.setitem(KINDS, name, Kind(field, part, lambda *_: {}, lambda *_: None, None))
        monkeypatch.setitem(METHODS, name, (name,))
    monkeypatch.setitem(METHODS, "magnitude", ("qkv", "o", "ffn", "down"))


@pytest.mark.parametrize(
    ("name", "kinds", "window"),
    [
        ("gate", ("gate",), 1),
        (" gate + down", ("gate", "down"), 1),
        ("gate+gate", ("gate",), 1),
        ("topk+o", ("top", "o"), 1),
        ("magnitude+down+screen", ("qkv", "o", "ffn", "down", "screen"), 1),
        ("lowrank+gate+reuse-8", ("lowrank", "gate"), 8),
    ],
)
def test_methods_combine(name: str, kinds: tuple[str, ...], window: int) -> None:
    found = parse(name)
    assert (found.kinds, found.window) == (kinds, window)
    assert parse(found.name) == found


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nonsense", "unknown method 'nonsense': choose from down, gate, topk"),
        ("gate+", "unknown method ''"),
        ("exact", "no calibration"),
        ("lowrank+router", "one predictor"),
        ("topk+lowrank", "topk"),
        ("magnitude+gate", "columns"),
        ("magnitude+lowrank", "columns"),
        ("reuse-8", "reuse-8 keeps"),
        ("screen+reuse-8", "reuse-8 keeps"),
        ("gate+reuse-8+reuse-4", "reuse-N"),
        ("gate+reuse-1", "reuse-N"),
        ("gate+reuse", "unknown method 'reuse'"),
    ],
)
def test_what_does_not_go_together_says_why(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        parse(name)
    assert "\n" not in str(error.value)


def test_a_selection_has_the_parts_of_its_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "gate", KINDS["gate"]._replace(fill=lambda packed, fits, densities: (fits, densities)))
    found = methods.selection(None, parse("gate+reuse-4"), {"gate": ["a", "b"]}, {"gate": [0.5, 1.0]})  # type: ignore[arg-type, list-item]
    assert (found.method, found.window, found.gate) == ("gate+reuse-4", 4, (["a", "b"], [0.5, 1.0]))
    assert Method("gate", ("gate",)).window == 1


def test_missed() -> None:
    fit = {"densities": np.array([0.1, 0.3, 1.0]), "missed": np.array([0.2, 0.1, 0.0])}
    assert methods.missed({"screen": [fit], "gate": []}, {"screen": [0.2], "gate": []}) == 0.2
    assert methods.missed({"screen": [fit]}, {"screen": [0.3]}) == 0.1
    assert methods.missed({"screen": [fit]}, {"screen": [1.0]}) == 0.0
    assert methods.missed({"gate": []}, {"gate": []}) is None
