"""Starting engines end to end, on a tiny model; cold starts only as far as they compile nothing."""

from __future__ import annotations

import json
import sys

import pytest

from fewfire.cache import cache_dir
from perf import results, start
from perf.peers import AbsentError, Request
from perf.report import figures


def test_starts_are_measured_and_reported(tiny_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    names = ["fewfire:q4", "llama.cpp:Q4_0"]
    options = ["--contenders", *names, "--threads", "1", "--warm", "1", "--cold", "0", "--name", "s"]
    start.main(["--model", str(tiny_path()), *options])
    assert "absent: llama.cpp:Q4_0" in capsys.readouterr().err  # the model is no GGUF file
    result = json.loads((tmp_path / "s.json").read_text())
    (ours,) = result["contenders"]
    assert ours["warm"]["median"] > 0
    assert ours["no_kernels"] is None
    assert sys.platform != "linux" or 0 < ours["memory_mb"]["resident"] <= ours["memory_mb"]["peak"]
    assert "| fewfire:q4 |" in figures({"s": result})


def test_a_peer_that_is_installed_starts(tiny_path, tmp_path):
    pytest.importorskip("transformers")
    request = start.Request(str(tiny_path()), 1, 64)
    (row,), absent = start.measure(["transformers:f32"], request, warm=1, cold=1)
    assert not absent
    assert row["warm"]["median"] > 0
    assert row["no_packed_model"] is None  # it makes nothing at its first start


def test_a_cold_cache_has_only_what_is_kept():
    kept, other = cache_dir() / "packed" / "kept", cache_dir() / "packed" / "other"
    for directory in (kept, other):
        directory.mkdir(parents=True)
        (directory / "file").write_text("x")
    with start.cold_cache([kept]) as cache:
        assert [p.relative_to(cache).as_posix() for p in cache.rglob("file")] == ["packed/kept/file"]
    assert not cache.exists()


def test_a_process_that_says_nothing_is_an_error():
    with pytest.raises(SystemExit, match="no more"):
        start.first_byte([sys.executable, "-c", "import sys; sys.exit('no more')"])


def test_a_dense_run_is_no_start_of_its_own(tiny_path):
    with pytest.raises(AbsentError, match="without -dense"):
        start.starter("fewfire:q4-dense", Request(str(tiny_path()), 1, 20), [5])
