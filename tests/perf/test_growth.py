"""Growth and busy processes end to end, on a tiny model."""

from __future__ import annotations

import json
import subprocess

import pytest

from perf import busy, growth, results
from perf.report import figures


def test_points_and_their_floors(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    models = [f"{tiny_path()}@100", str(tiny_path("qwen3"))]
    quick = ["--contexts", "20", "100", "--tokens", "4", "--rounds", "2", "--stream", "1", "--threads", "1", "2"]
    growth.main(["--models", *models, *quick, "--name", "g"])
    result = json.loads((tmp_path / "g.json").read_text())
    assert [(p["model"], p["threads"], p["context"]) for p in result["points"]] == [
        ("llama", 2, 20), ("llama", 2, 100), ("llama", 1, 20), ("llama", 1, 100), ("qwen3", 2, 20), ("qwen3", 1, 20)
    ]  # fmt: skip
    short, long = result["points"][:2]
    assert long["megabytes_per_token"] > short["megabytes_per_token"]
    assert long["floor_milliseconds"] > short["floor_milliseconds"] > 0
    assert "| llama" in figures({"g": result})


def test_a_context_that_is_too_long(tiny_path):
    with pytest.raises(ValueError, match="context of 160"):
        growth.main(["--models", f"{tiny_path()}@512", "--contexts", "512", "--tokens", "4", "--name", "-"])


def test_beside_busy_processes(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    names = ["fewfire:q4", "transformers:f32"]
    options = ["--busy", "1", "--rounds", "1", "--tokens", "4", "--threads", "1", "--name", "b"]
    busy.main(["--model", str(tiny_path()), "--contenders", *names, *options])
    result = json.loads((tmp_path / "b.json").read_text())
    measured = [n for n in names if n not in result["absent"]]
    assert {(r["name"], r["busy"]) for r in result["speeds"]} == {(n, b) for n in measured for b in (0, 1)}
    assert all(r["of_undisturbed"]["median"] == 1 for r in result["speeds"] if r["busy"] == 0)
    assert "Beside busy processes, llama" in figures({"b": result})


def test_busy_processes_end(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def interrupted() -> None:
        with busy.busy_processes(2):
            assert [p.poll() for p in started] == [None, None]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(p.poll() is not None for p in started)
