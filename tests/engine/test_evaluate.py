import math

import numpy as np
import pytest

from fakes import BOS, ScriptedModel, ScriptedSession
from fewfire import evaluate
from fewfire.errors import FewfireError
from fewfire.evaluate import compare, log_softmax, perplexity, perplexity_growth, token_nll

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


def test_decoding_reads_one_token_at_a_time():
    model, fed = Bigram(), []

    class Watched(ScriptedSession):
        def feed(self, ids, *, all_logits=False):
            fed.append(len(ids))
            return super().feed(ids, all_logits=all_logits)

    model.session = lambda: Watched(model)
    whole = perplexity(Bigram(), TEXT, window=20)
    assert perplexity(model, TEXT, window=20, decode=True).nll == pytest.approx(whole.nll)
    assert set(fed) == {1}


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


class Blurred(Bigram):
    """The bigram with its table's every second row halved."""

    table = Bigram.table * np.where(np.arange(300) % 2, 1, 0.5)[:, None].astype(np.float32)


def test_a_model_compared_with_itself():
    result = compare(Bigram(), Bigram(), TEXT, window=7)
    assert (result.growth, result.growth_error, result.kl, result.agreement) == (0, 0, 0, 1)
    assert result.ppl == result.dense_ppl == pytest.approx(perplexity(Bigram(), TEXT, window=7).ppl)


def test_comparison_by_hand():
    model, dense = Blurred(), Bigram()
    model.table = model.table.copy()
    model.table[:150] = model.table[:150, ::-1]  # another likeliest token after half of the tokens
    calls, ids = [], dense.tokenizer.encode(TEXT)
    result = compare(model, dense, TEXT, window=7, progress=lambda *a: calls.append(a))
    read = [ids[i - 1] for i in range(len(ids)) if i % 7]
    p = np.exp(dense.table.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    q = np.exp(model.table.astype(np.float64))
    q /= q.sum(axis=1, keepdims=True)
    assert result.kl == pytest.approx(np.mean([(p[i] * np.log(p[i] / q[i])).sum() for i in read]), rel=1e-6)
    same = [p[i].argmax() == q[i].argmax() for i in read]
    assert 0 < np.mean(same) < 1
    assert result.agreement == pytest.approx(np.mean(same))
    assert result.ppl == pytest.approx(perplexity(model, TEXT, window=7).ppl)
    assert result.dense_ppl == pytest.approx(perplexity(dense, TEXT, window=7).ppl)
    assert result.growth == pytest.approx(result.ppl / result.dense_ppl - 1)
    assert result.tokens == len(read)
    assert calls[-1] == ("perplexity", calls[-1][2], calls[-1][2])


def test_one_window_has_no_error_of_growth():
    assert math.isnan(compare(Blurred(), Bigram(), TEXT, window=100).growth_error)


def test_growth_and_its_error():
    counts = np.array([2, 2, 1])
    growth, error = perplexity_growth(np.array([3.3, 4.4, 5.5]), np.array([3.0, 4.0, 5.0]), counts)
    assert growth == pytest.approx(math.exp(1.2 / 5) - 1)
    assert error > 0
    even = perplexity_growth(np.array([2.2, 2.2, 1.1]), np.array([2.0, 2.0, 1.0]), counts)
    assert even == pytest.approx((math.exp(0.1) - 1, 0), abs=1e-9)  # every window grows alike


def test_comparison_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="vocabulary"):
        compare(Bigram(), Bigram(vocab_size=7), TEXT, window=7)
    with pytest.raises(ValueError, match="dense model's context of 50"):
        compare(Bigram(), Bigram(context=50), TEXT, window=60)
    broken = Bigram()
    broken.logits_after = lambda tokens: np.full(300, np.nan, dtype=np.float32)
    for pair in ((broken, Bigram()), (Bigram(), broken)):
        with pytest.raises(FewfireError, match="finite"):
            compare(*pair, TEXT, window=7)


def test_log_softmax_of_large_logits():
    found = log_softmax(np.array([[1000.0, 1000.0], [0.0, 2000.0]], dtype=np.float32))
    np.testing.assert_allclose(found, [[-math.log(2)] * 2, [-2000, 0]])
