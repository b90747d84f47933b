"""Probes change nothing but the time, and the profile of a tiny model end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fewfire
from fewfire.calibrate import calibrate
from fewfire.model import Model
from fewfire.pack import pack
from fewfire.packed import open_packed
from perf import probes, profile, results
from perf.depth import DeepFewfire
from perf.peers import Request
from perf.report import figures

OF_SELECTIONS = ["predictor", "screen"]


@pytest.mark.parametrize(
    ("family", "missing"), [("llama", ["bypass"]), ("opt", ["up", "bypass"]), ("llama-centred", [])]
)
def test_probes_see_every_part_and_leave_the_logits_as_they_are(family, missing, tiny_path):
    model = fewfire.load(tiny_path(family), weights="q4", threads=1)
    plain = model.session().feed([5]).copy()
    record = model.engine._model.record.copy()
    with probes.Probes(model) as counted:
        np.testing.assert_array_equal(model.session().feed([5]), plain)
    parts = dict(zip(probes.PARTS, counted.ticks.tolist(), strict=True))
    assert [part for part, ticks in parts.items() if not ticks] == [*missing, *OF_SELECTIONS]
    assert model.engine._model.record == record


def test_a_token_is_profiled_and_reported(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    quick = ["--rounds", "1", "--context", "20", "--tokens", "4", "--stream", "1", "--name", "p"]
    profile.main(["--model", str(tiny_path()), *quick])
    result = json.loads((tmp_path / "p.json").read_text())
    parts = {r["part"]: r for r in result["parts"]}
    there = [part for part in probes.PARTS if part not in ("bypass", *OF_SELECTIONS)]
    assert list(parts) == [*there, profile.LOOP, profile.TOKEN, profile.PLAIN]
    read = [r["megabytes"] for part, r in parts.items() if part in (*probes.PARTS,) and "megabytes" in r]
    assert sum(read) == pytest.approx(parts[profile.TOKEN]["megabytes"], rel=1e-3)
    assert "| down " in figures({"p": result})


@pytest.mark.parametrize("family", ["llama", "llama-relu", "llama-centred"])
def test_the_parts_bytes_are_those_of_a_token(family, tiny_path):
    deep = DeepFewfire("fewfire:q4", Request(str(tiny_path(family)), 1, 20), [1])
    deep.decode(1, 20, 4)
    assert (deep.engine.neurons_read() < (1, 1)) == (family != "llama")
    needed = deep.engine.bytes_per_token(10)
    assert 0.9 * needed < sum(profile.bytes_read(deep, 10).values()) <= needed  # all but norms and biases


def test_what_a_selection_reads_has_parts_of_its_own(tiny_path, tmp_path):
    path = pack(tiny_path(), tmp_path / "packed", "q4")
    calibrate(Model(open_packed(path), 1), method="lowrank+screen", density=0.3, text="A quick brown fox. " * 60)
    deep = DeepFewfire("fewfire:q4", Request(str(path), 1, 20), [1])
    with probes.Probes(deep.model) as counted:
        deep.decode(1, 20, 4)
    parts = dict(zip(probes.PARTS, counted.ticks.tolist(), strict=True))
    assert [part for part, ticks in parts.items() if not ticks] == ["bypass"]
    needed, read = deep.model.engine.bytes_read(), profile.bytes_read(deep, 20)
    read.pop("attention")
    assert 0.8 * needed < sum(read.values()) <= needed  # all but thresholds, biases and lists
