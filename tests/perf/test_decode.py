"""The speed command end to end on a tiny model: installed peers take part, others are said to be absent."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from perf import decode, results
from perf.report import figures


def test_contenders_are_measured_and_reported(tiny_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    small = ["--rounds", "2", "--prompt", "8", "--tokens", "3", "--stream", "1", "--threads", "1", "2", "--starts", "0"]
    names = ["fewfire:q4", "transformers:f32", "llama.cpp:Q4_0"]
    decode.main(["--model", str(tiny_path()), "--contenders", *names, *small, "--name", "tiny"])
    out = capsys.readouterr()
    assert "absent: llama.cpp:Q4_0" in out.err  # the model is no GGUF file
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert [(c["name"], c["threads"]) for c in result["contenders"]] == [
        ("fewfire:q4", 1), ("fewfire:q4", 2), ("transformers:f32", 1), ("transformers:f32", 2)
    ]  # fmt: skip
    assert [(r["peer"], r["threads"]) for r in result["ratios"]] == [("transformers:f32", 1), ("transformers:f32", 2)]
    for contender in result["contenders"]:
        speed = contender["decode_tokens_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert contender["share_of_bandwidth"] > 0
    assert "fewfire:q4 / transformers:f32" in figures({"tiny": result})
    assert str(tmp_path) not in json.dumps(result["machine"])


def test_the_format_that_reads_a_prompt_fastest_is_marked():
    names = ["fewfire:q4", "llama.cpp:Q4_0", "llama.cpp:Q8_0", "ctranslate2:int8"]
    contenders = [SimpleNamespace(name=name, threads=1) for name in names]
    samples = [decode.Samples([seconds], [1.0]) for seconds in (1.0, 3.0, 2.0, 1.0)]
    found = decode.ratios(contenders, samples)
    assert [r["peer"] for r in found if r["best_prefill"]] == ["llama.cpp:Q8_0"]
    short = decode.ratio_table({"ratios": found}, all_pairs=False)
    assert "fewfire:q4 / llama.cpp:Q8_0 (its best prefill)" in short
    assert "fewfire:q4 / llama.cpp:Q4_0 " in short  # equal bits


def test_an_unknown_engine_is_an_error(tiny_path):
    with pytest.raises(ValueError, match="unknown engine"):
        decode.main(["--model", str(tiny_path()), "--contenders", "nonsense:q4", "--name", "-"])
