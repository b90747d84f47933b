"""Windows, and how differences of perplexity are told."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fewfire.evaluate import perplexity
from fewfire.windows import cut_tokens
from perf.peers import Fewfire, Request
from perf.quality import excess, losses


def test_excess_of_the_same_losses_is_nothing():
    loss, cut = np.array([3.0, 4.0]), [[1, 2, 3], [4, 5]]
    assert excess(loss, loss, cut) == {"percent": 0.0, "error": 0.0}


def test_excess_is_the_ratio_of_perplexities():
    base, cut = np.array([3.0, 4.0, 5.0]), [[1, 2, 3], [4, 5, 6], [7, 8]]
    found = excess(base * 1.1, base, cut)
    assert found["percent"] == pytest.approx(100 * (math.exp(1.2 / 5) - 1), rel=1e-4)
    assert found["error"] > 0


def test_the_engine_gets_the_same_perplexity_as_from_fewfire_eval(tiny_path):
    contender = Fewfire("fewfire:q8", "q8", Request(str(tiny_path()), 1, 16))
    text = "a few words to be scored, and some more"
    ids = contender.model.tokenizer.encode(text)
    assert not contender.model.config.add_bos_token
    cut = cut_tokens(ids, 16)
    nll = losses(contender, cut).sum() / sum(len(window) - 1 for window in cut)
    assert nll == pytest.approx(perplexity(contender.model, text, window=16).nll, rel=1e-5)
