"""Every method on a tiny model of every family: fitted, used, and dense where it keeps everything."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import tiny
from decoding import decoded
from fewfire import calibration
from fewfire.calibration import Calibration
from fewfire.config import EXACT_ZEROS
from fewfire.model import Model
from fewfire.packed import Packed
from fewfire.quantize import row_bytes
from fewfire.selectors.choices import added_bytes
from fewfire.selectors.methods import KINDS, METHODS, Method, parse, selection
from fewfire.selectors.selection import COLUMNS

IDS = tiny.prompt(12)
COMBINED = ("gate+down", "lowrank+gate+down+qkv+o+screen", "gate+reuse-4", "magnitude+screen")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_method(family: str, own_packed: Callable[[str, str], Packed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_WINDOW", 64)
    packed = own_packed(family, "q4")
    model = Model(packed, 1, dense=True)
    dense, work, exact = (
        decoded(model, IDS),
        Calibration(model, tiny.PARAGRAPH * 6),
        packed.config.hidden_act in EXACT_ZEROS,
    )
    work.fit([*METHODS, "gate+down"])
    for method in (*METHODS, *COMBINED):
        kinds = parse(method).kinds
        # A share that every fit knows, and that a screen's rows leave something of.
        some = {k: [float(f["densities"][len(f["densities"]) // 2 - 1]) for f in work.fits(k)] for k in kinds}
        model.engine.select(work.selection(method, some), dense=True)
        logits = decoded(model, IDS)
        assert np.isfinite(logits).all(), method
        if not {"screen", "predictor"} & {KINDS[kind].field for kind in kinds}:  # which cost a tiny model more
            assert model.engine.bytes_read() < packed.bytes_per_token(), method
        every = {k: [1.0] * len(work.fits(k)) for k in kinds}
        model.engine.select(work.selection(method, every), dense=not exact)
        np.testing.assert_array_equal(decoded(model, IDS), dense if not exact else decoded_again(model), method)
    assert set(KINDS) == {kind for method in METHODS for kind in METHODS[method]}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_a_kind_adds_is_what_the_kernels_count(
    kind: str, own_packed: Callable[[str, str], Packed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_WINDOW", 64)
    packed = own_packed("llama", "q4")
    model, c, of = Model(packed, 1, dense=True), packed.config, packed.formats
    work = Calibration(model, tiny.PARAGRAPH * 6)
    fits = work.fits(kind)
    densities = {kind: [float(fit["densities"][len(fit["densities"]) // 2 - 1]) for fit in fits]}
    model.engine.select(selection(packed, Method(kind, (kind,)), {kind: fits}, densities), dense=True)
    decoded(model, IDS)
    row, field = row_bytes(of.rows, c.hidden_size), KINDS[kind].field
    gate, up, down = (c.intermediate_size - model.engine.neurons_read()).sum(axis=0)
    rows = packed.bytes_per_token() - row * (gate + up) - row_bytes(of.down, c.hidden_size) * down
    if field in COLUMNS:
        rows += int(model.engine._work.projected.sum())
        rows -= packed.arrays[field].nbytes if field in packed.arrays else 0  # gate and up count as neurons
    if field == "screen":
        rows -= packed.arrays["head"].nbytes - row_bytes(of.table, c.hidden_size) * int(model.engine._work.exact.sum())
    assert model.engine.bytes_read() - rows == added_bytes(packed, kind, fits) * len(fits)


def decoded_again(model: Model) -> np.ndarray:
    """Without a selection: zeros that a ReLU makes change the order of additions."""
    model.engine.select(None)
    return decoded(model, IDS)
