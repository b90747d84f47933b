"""Going back in a text that was read: what is decoded there is what reading up to there would give."""

from __future__ import annotations

import numpy as np
import pytest

from perf import shapes, synthetic
from perf.depth import load_deep
from perf.peers import AbsentError, Request


def test_fewfire_decodes_at_any_position(tiny_path):
    deep = load_deep("fewfire:q8", Request(str(tiny_path()), 2, 24), [1, 2])
    vocab = deep.model.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, 24).tolist()
    for threads, position in ((2, 20), (1, 7), (2, 23)):
        deep.return_to(position, threads)
        deep._token = ids[position]
        deep.step(position)
        expected = deep.model.logits(ids[: position + 1])[-1]
        np.testing.assert_allclose(deep._logits[0], expected, atol=0.02 * np.abs(expected).max())
    assert deep.decode(1, 20, 3) > 0


def test_llama_cpp_goes_back_to_what_it_read(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    small = {"vocab_size": 700, "num_hidden_layers": 2, "intermediate_size": 512}
    monkeypatch.setitem(shapes.SHAPES, "nano", shapes.SHAPES["tiny"] | small)
    synthetic.main(["nano", "--out", str(tmp_path), "--weights", "--gguf", "Q8_0", "--tokens", "4"])
    deep = load_deep("llama.cpp:original", Request(str(tmp_path / "nano-0.1"), 2, 40), [1, 2])
    ids = np.random.default_rng(0).integers(0, 700, 40).tolist()
    for threads, position in ((2, 30), (1, 10), (2, 35)):
        deep.return_to(position, threads)
        went_back = deep.engine.feed([ids[position]]).copy()
        deep.engine.reset()
        fresh = deep.engine.feed(ids[: position + 1])
        np.testing.assert_allclose(went_back, fresh, atol=0.05 * np.abs(fresh).max())
    assert deep.decode(1, 20, 3) > 0


def test_others_are_absent_or_unknown(tiny_path):
    request = Request(str(tiny_path()), 1, 20)
    with pytest.raises(AbsentError, match="not measured"):
        load_deep("ctranslate2:int8", request, [1])
    with pytest.raises(ValueError, match="unknown engine"):
        load_deep("nonsense:q4", request, [1])
