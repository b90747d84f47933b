import json

import pytest

from commandline import run

QUICK = ["--prompt", 20, "--tokens", 5, "--repeat", 3]


def test_table(model):
    result = run("bench", model, *QUICK, "--weights", "q4,q8", "--threads", "1,2")
    lines = result.out.splitlines()
    assert result.code == 0
    assert lines[0].split("|")[1].strip() == "model"
    assert set(lines[1]) == set("|-: ")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [(c[1], c[3], c[4], c[5]) for c in cells] == [
        (form, threads, "dense", test) for form in ("q4", "q8") for threads in ("1", "2") for test in ("pp20", "tg5")
    ]
    assert all(float(c[6].split(" ± ")[0]) > 0 for c in cells)


def test_json_has_every_run(model):
    rows = json.loads(run("bench", model, *QUICK, "--threads", 1, "--json").out)
    assert [(r["test"], r["weights"], r["threads"]) for r in rows] == [("pp20", "q4", 1), ("tg5", "q4", 1)]
    for row in rows:
        assert len(row["tokens_per_second"]) == 3
        assert row["median"] == pytest.approx(sorted(row["tokens_per_second"])[1])


def test_what_is_left_out_is_named(tiny_path):
    """Of a prompt nothing is."""
    relu = tiny_path("llama-relu")
    for options, methods in ([], ["dense", "exact"]), (["--dense"], ["dense", "dense"]):
        rows = json.loads(run("bench", relu, *QUICK, *options, "--json").out)
        assert [r["method"] for r in rows] == methods


def test_tests_can_be_left_out(model):
    assert [r["test"] for r in json.loads(run("bench", model, *QUICK, "--prompt", 0, "--json").out)] == ["tg5"]
    assert [r["test"] for r in json.loads(run("bench", model, *QUICK, "--tokens", 0, "--json").out)] == ["pp20"]
    run("bench", model, *QUICK, "--prompt", 0, "--tokens", 0).failed(2, "nothing to time")


def test_a_packed_model_is_timed_once_in_its_own_format(model, tmp_path):
    assert run("pack", model, tmp_path / "packed", "--weights", "q8").code == 0
    rows = json.loads(run("bench", tmp_path / "packed", *QUICK, "--weights", "q4,q8", "--threads", 1, "--json").out)
    assert [(r["weights"], r["test"]) for r in rows] == [("q8", "pp20"), ("q8", "tg5")]


def test_bad_input(model):
    run("bench", model, *QUICK, "--threads", "1,x").failed(2, "--threads", "1,x")
    run("bench", model, *QUICK, "--threads", "0").failed(2, "threads")
    run("bench", model, *QUICK, "--weights", "q4,q3").failed(2, "q3")
    run("bench", model, *QUICK, "--prompt", 161).failed(2, "prompt", "160")
    run("bench", model, *QUICK, "--tokens", -1).failed(2, "tokens")
    run("bench", model, *QUICK, "--repeat", 0).failed(2, "repeat")
