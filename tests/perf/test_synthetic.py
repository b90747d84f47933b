"""Models with random weights: what is written is what was drawn, and as many neurons fire as were asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fewfire
import tiny
from fewfire import reference
from fewfire.checkpoint import open_checkpoint
from fewfire.families import read_config
from perf import decode, shapes, synthetic
from perf.judge import Judge
from perf.peers import Request, load_all
from perf.randomweights import RandomWeights, firing

NANO = shapes.SHAPES["tiny"] | {
    "vocab_size": 700,
    "hidden_size": 256,
    "intermediate_size": 800,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A very small shape, everything kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "nano", NANO)
        patch.setattr(synthetic, "_SHARD", 2_000_000)
        patch.setattr(synthetic, "_ROWS", 300)
        out = tmp_path_factory.mktemp("synthetic")
        synthetic.main(["nano", "--share", "0.2", "--out", str(out), "--keep", "--gguf", "Q8_0", "F16"])
    return out / "nano-0.2"


@pytest.fixture(scope="module")
def weights():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "nano", NANO)
        return RandomWeights(read_config(shapes.config("nano"))[1], 0.2)


def test_the_checkpoint_and_the_gguf_hold_what_was_drawn(made, weights):
    checkpoint, gguf = open_checkpoint(made / "checkpoint"), open_checkpoint(made / "nano-F16.gguf")
    assert len(list((made / "checkpoint").glob("*.safetensors"))) > 1
    for name in weights:
        np.testing.assert_array_equal(checkpoint.read(name), weights.read(name))
        np.testing.assert_allclose(gguf.read(name), weights.read(name), atol=2e-3)
    ours, theirs = (c.config.rope.inverse_frequencies(c.config.head_dim) for c in (checkpoint, gguf))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_rows_do_not_depend_on_how_they_are_read(weights):
    for name in ("embed.weight", "layers.1.gate.weight", "layers.2.down.weight", "final_norm.weight"):
        whole = weights.read(name)
        np.testing.assert_array_equal(np.concatenate([weights.read(name, 0, 100), weights.read(name, 100)]), whole)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_that_was_asked_for_fires(weights, share):
    shares, logits = firing(RandomWeights(weights.config, share), 64)
    assert np.mean(shares) == pytest.approx(share, rel=0.15)
    assert 0.5 < logits.std() < 5


def test_firing_computes_what_the_reference_does(weights):
    ids = np.random.default_rng(weights.seed).integers(0, NANO["vocab_size"], 16)
    np.testing.assert_allclose(firing(weights, 16)[1], reference.forward(weights.config, weights, ids), atol=1e-4)


def test_fewfire_runs_it(made, weights):
    _, expected = firing(weights, 16)
    ids = np.random.default_rng(weights.seed).integers(0, NANO["vocab_size"], 16).tolist()
    model = fewfire.load(made / "q8", threads=1)
    assert np.abs(model.logits(ids) - expected).max() < 0.1 * expected.std() * 6
    assert model.tokenizer.decode(model.tokenizer.encode("he said: ça va")) == "he said: ça va"
    assert model.generate("hello", max_tokens=10).token_ids


def test_the_harness_takes_the_directory_and_tells_that_it_is_random(made, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("perf.results.RESULTS", tmp_path)
    quick = ["--rounds", "1", "--prompt", "8", "--tokens", "3", "--stream", "1", "--threads", "1"]
    quick += ["--starts", "1", "--cold", "0"]
    decode.main(["--model", str(made), "--contenders", "fewfire:q8", "transformers:f32", *quick, "--name", "x"])
    assert "absent: transformers:f32" in capsys.readouterr().err
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["model"].startswith("nano shape, random weights, ")
    assert [row["name"] for row in result["starts"]] == ["fewfire:q8"]
    assert str(made) not in json.dumps(result)


def test_it_is_judged_beside_itself(made, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny.PARAGRAPH)
    judging = Judge(str(made), "q8", 1, [str(text)], 40)
    row = judging.row(judging.open(str(made)))
    assert row["rows_read"]["down"] == pytest.approx(0.2, abs=0.05), "what ReLU leaves"
    assert row["texts"][0]["growth_percent"] == pytest.approx(0, abs=0.1)


def test_the_harness_goes_on_with_random_tokens(made, monkeypatch):
    contenders, _ = load_all(["fewfire:q8"], [Request(str(made), 1, 40)])
    fed = []
    feed = contenders[0].feed
    monkeypatch.setattr(contenders[0], "feed", lambda ids: fed.append(ids) or feed(ids))
    contenders[0].prefill([1, 2, 3])
    contenders[0].decode(30)
    assert len({tuple(ids) for ids in fed}) > 25


def test_a_share_must_be_one(weights):
    with pytest.raises(ValueError, match="share"):
        RandomWeights(weights.config, 1.0)
