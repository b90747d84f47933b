import math

import numpy as np
import pytest

from fakes import BOS, ScriptedModel
from fewfire import evaluate
from fewfire.errors import FewfireError
from fewfire.evaluate import perplexity, token_nll

TEXT = "The lamp turns, the log is written up every evening, and the kettle on the stove is warm."


class Bigram(ScriptedModel):
    """Its prediction depends on the last token alone, so a text's nll can be said in one line."""

    table = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32) * 3

    def logits_after(self, tokens):
        return self.table[tokens[-1]]


def nll(a: int, b: int) -> float:
    row = Bigram.table[a].astype(np.float64)
    return float(np.log(np.exp(row).sum()) - row[b])


@pytest.mark.parametrize("window", [2, 7, 100])
def test_every_token_but_the_first_of_each_window(window):
    model = Bigram()
    ids = model.tokenizer.encode(TEXT)
    pairs = [(ids[i - 1], ids[i]) for i in range(len(ids)) if i % window]
    result = perplexity(model, TEXT, window=window)
    assert result.tokens == len(pairs)
    assert result.nll == pytest.approx(np.mean([nll(a, b) for a, b in pairs]), abs=1e-5)
    assert result.ppl == pytest.approx(math.exp(result.nll))


def test_with_bos_every_token_of_the_text_is_scored():
    model = Bigram(add_bos_token=True)
    ids = model.tokenizer.encode(TEXT)
    before = [BOS if i % 6 == 0 else ids[i - 1] for i in range(len(ids))]
    result = perplexity(model, TEXT, window=7)
    assert result.tokens == len(ids)
    assert result.nll == pytest.approx(np.mean([nll(a, b) for a, b in zip(before, ids, strict=True)]), abs=1e-5)


def test_parts_of_a_window_change_nothing(monkeypatch):
    whole = perplexity(Bigram(), TEXT, window=50)
    monkeypatch.setattr(evaluate, "_LOGITS_AT_ONCE", 1)
    assert perplexity(Bigram(), TEXT, window=50).nll == pytest.approx(whole.nll)


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    model = Bigram()
    model.logits_after = lambda tokens: np.zeros(300, dtype=np.float32)
    assert perplexity(model, TEXT, window=20).ppl == pytest.approx(300)


def test_limit_and_progress():
    calls = []
    result = perplexity(Bigram(), TEXT, window=4, limit=10, progress=lambda *a: calls.append(a))
    assert result.tokens == 7
    assert calls[0] == ("perplexity", 0, 10)
    assert calls[-1] == ("perplexity", 10, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window"),
        ({"window": 101}, "context of 100"),
        ({"window": 1.5}, "window"),
        ({"limit": 1}, "limit"),
        ({"text": ""}, "0 tokens"),
        ({"text": "a\udce9"}, "Unicode"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Bigram(), options.pop("text", TEXT), **options | {"window": options.get("window", 50)})


def test_numbers_that_are_not_finite_are_an_error():
    model = Bigram()
    model.logits_after = lambda tokens: np.full(300, np.nan, dtype=np.float32)
    with pytest.raises(FewfireError, match="finite"):
        perplexity(model, TEXT, window=20)


def test_token_nll_of_large_logits():
    logits = np.array([[1000.0, 0.0], [0.0, 1000.0]], dtype=np.float32)
    assert token_nll(logits, [0, 0]).tolist() == pytest.approx([0.0, 1000.0])
