import json

import numpy as np
import pytest

import fewfire
from commandline import run
from fewfire.evaluate import perplexity
from fewfire.selectors import Selection, store
from tiny import PARAGRAPH

ABOUT = store.About("gate", 0.5, {}, {"density": 0.5}, "own", 100, 0.01, 0.001, 0.009, 0.97, 50, 100, 1.5)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(PARAGRAPH, encoding="utf-8")
    return path


def test_json_equals_the_library(model, text):
    data = json.loads(run("eval", model, text, "--window", 50, "--json").out)
    expected = perplexity(fewfire.load(model), PARAGRAPH, window=50)
    assert data["ppl"] == pytest.approx(expected.ppl)
    assert (data["tokens"], data["weights"], data["window"]) == (expected.tokens, "q4", 50)


def test_what_it_says(model, text):
    result = run("eval", model, text, "--window", 50)
    assert result.out.startswith("perplexity ")
    assert "tokens/s" in result.out


def test_part_and_limit(model, text):
    half = PARAGRAPH[len(PARAGRAPH) // 2 :]
    data = json.loads(run("eval", model, text, "--window", 50, "--part", "0.5:1", "--json").out)
    assert data["nll"] == pytest.approx(perplexity(fewfire.load(model), half, window=50).nll)
    assert json.loads(run("eval", model, text, "--window", 50, "--tokens", 20, "--json").out)["tokens"] == 19


@pytest.mark.parametrize("part", ["1:0", "0:2", "x", "0.5", "-1:1", "nan:1", "0:0"])
def test_bad_part(model, text, part):
    run("eval", model, text, "--part", part).failed(2, "--part")


def test_bad_input(model, text, tmp_path):
    run("eval", model, tmp_path / "none").failed(1, "none: No such file")
    run("eval", model, text, "--window", 1).failed(2, "window")
    run("eval", model, text, "--window", 10_000).failed(2, "window", "160")
    run("eval", model, text, "--window", 50, "--tokens", 1).failed(2, "limit")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    run("eval", model, tmp_path / "latin").failed(2, "latin", "UTF-8")
    (tmp_path / "empty").write_bytes(b"")
    run("eval", model, tmp_path / "empty", "--window", 50).failed(2, "0 tokens")


def test_decoding_differs_from_reading_at_once_by_its_rounding(model, text):
    at_once, decoded = (
        json.loads(run("eval", model, text, "--window", 50, "--json", *o).out) for o in ((), ["--decode"])
    )
    assert (at_once["decoded"], decoded["decoded"]) == (False, True)
    assert decoded["nll"] != at_once["nll"]
    assert decoded["nll"] == pytest.approx(at_once["nll"], rel=0.02)


def test_against_dense(tiny_path, text):
    """Neurons that a ReLU makes zero change nothing when they are left out."""
    relu = tiny_path("llama-relu")
    data = json.loads(run("eval", relu, text, "--window", 50, "--tokens", 120, "--against", "dense", "--json").out)
    assert data["ppl"] == pytest.approx(data["dense_ppl"], rel=1e-4)
    assert data["growth"] == pytest.approx(0, abs=1e-4)
    assert data["kl"] == pytest.approx(0, abs=1e-5)
    assert data["agreement"] > 0.95
    decoded = json.loads(run("eval", relu, text, "--window", 50, "--tokens", 120, "--decode", "--json").out)
    assert data["ppl"] == pytest.approx(decoded["ppl"])
    assert data["tokens"] == decoded["tokens"]
    said = run("eval", relu, text, "--window", 50, "--tokens", 40, "--against", "dense").out
    assert "dense" in said
    assert "KL" in said
    assert "±" not in said  # one window tells no spread


def test_a_calibrated_model(model, text, tmp_path):
    """What was measured is said, and where a calibration does not show, too."""
    packed = tmp_path / "packed"
    assert run("pack", model, packed).code == 0
    loaded = fewfire.load(packed, threads=1)
    shape = loaded.config.num_hidden_layers, loaded.config.intermediate_size
    store.save(loaded.packed, Selection("gate", gate=np.full(shape, 0.2, np.float32)), ABOUT)
    options = ["--window", 50, "--tokens", 200]
    said = run("eval", packed, text, *options)
    assert "read at once, with all weights" in said.out
    assert "read with all weights: --decode scores gate" in said.err
    dense = json.loads(run("eval", packed, text, *options, "--dense", "--json").out)
    assert json.loads(run("eval", packed, text, *options, "--json").out)["ppl"] == dense["ppl"]
    decoded = run("eval", packed, text, *options, "--decode")
    assert "; decoded, gate, " in decoded.out
    assert "all weights" not in decoded.out + decoded.err
    data = json.loads(run("eval", packed, text, *options, "--against", "dense", "--json").out)
    assert (data["method"], data["decoded"]) == ("gate", True)
    assert data["bytes_per_token"] < data["dense_bytes_per_token"]
    assert 0 < data["kl_median"] < data["kl_99"] < data["kl_max"]
    for key in ("growth_error", "kl_error", "agreement_error", "tokens_per_second", "dense_tokens_per_second"):
        assert data[key] > 0
    shown = run("eval", packed, text, *options, "--against", "dense").out
    assert shown.count("±") == 3
    for word in ("gate: ", "median", "99%", "largest", "tokens/s instead of"):
        assert word in shown


def test_nothing_to_compare(model, text):
    run("eval", model, text, "--window", 50, "--against", "dense").failed(2, "nothing is left out", "fewfire calibrate")


def test_against_itself_or_the_unknown(model, text):
    run("eval", model, text, "--window", 50, "--dense", "--against", "dense").failed(2, "compares it with itself")
    run("eval", model, text, "--window", 50, "--against", "sparse").failed(2, "--against", "sparse")
