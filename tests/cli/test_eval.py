import json

import pytest

import fewfire
from commandline import run
from fewfire.evaluate import perplexity
from tiny import PARAGRAPH


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
