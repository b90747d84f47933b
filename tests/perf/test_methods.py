"""The table of methods from end to end, on a tiny model."""

from __future__ import annotations

import json

import pytest

import tiny
from commandline import run
from perf import machine, methods, results
from perf.report import figures


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(methods, "sample_text", lambda: tiny.PARAGRAPH * 8)
    monkeypatch.setattr("fewfire.calibration._WINDOW", 64)
    monkeypatch.setattr("fewfire.timing._ROUNDS", 1)
    monkeypatch.setattr(machine, "_commit", lambda: "abc")
    return tmp_path


def test_methods_and_their_baselines(quick, tiny_path, tmp_path, monkeypatch, capsys):
    packed, text = tmp_path / "packed", tmp_path / "text.txt"
    assert run("pack", tiny_path(), packed).code == 0
    text.write_text("Somebody else wrote this about the boat and the hill. " * 40)
    options = [str(packed), str(text), "--threads", "1", "--tokens", "100", "--densities", "0.8", "0.5", "--name", "m"]
    options += ["--baselines", "gate"]
    methods.main([*options, "--methods", "gate", "magic"])
    first = json.loads((quick / "m.json").read_text())
    assert [(r["method"], r["spread"], r["asked"]) for r in first["rows"]] == [
        ("gate", "spread", 0.8), ("gate", "spread", 0.5), ("gate", "greedy", 0.5), ("gate", "uniform", 0.5)
    ]  # fmt: skip
    assert first["scored"] == 99
    for row in first["rows"]:
        assert abs(row["density"] - row["asked"]) < 0.1
        assert row["speedup"] > 0
        assert row["megabytes_per_token"] < first["dense"]["megabytes_per_token"]
    assert "magic" in first["absent"]
    assert "absent: magic: unknown method" in capsys.readouterr().err

    methods.main([*options, "--methods", "gate", "down"])
    second = json.loads((quick / "m.json").read_text())
    assert second["rows"][:4] == first["rows"], "what is there is not measured again"
    assert [r["method"] for r in second["rows"][4:]] == ["down", "down"]
    section = figures({"m": second})
    assert "| gate | " in section
    assert "uniform" in section

    monkeypatch.setattr(machine, "_commit", lambda: "abc+")
    methods.main([*options, "--methods", "down"])
    assert len(json.loads((quick / "m.json").read_text())["rows"]) == 2, "of another engine"


def test_a_density_out_of_reach_is_said():
    row = {"method": "screen", "spread": "spread", "growth_percent": 1.0, "speedup": 1.5}
    rows = [row | {"asked": 0.2, "density": 0.4}, row | {"asked": 0.5, "density": 0.51}]
    line = methods.methods_table({"rows": rows}).splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["screen", "+1.0 %, 1.50x", "+1.0 %, 1.50x at 0.40"]


def test_a_density_of_the_baselines_alone_is_no_column():
    row = {"spread": "spread", "growth_percent": 1.0, "speedup": 1.5}
    rows = [row | {"method": m, "asked": d, "density": d} for m in ("gate", "down", "topk") for d in (0.2, 0.4)]
    rows.append(row | {"method": "gate", "asked": 0.5, "density": 0.5})
    header = methods.methods_table({"rows": rows}).splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["", "0.4", "0.2"]
