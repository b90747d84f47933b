import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest

from fakes import BOS, ScriptedModel, ScriptedSession
from fewfire import evaluate
from fewfire.errors import FewfireError
from fewfire.evaluate import compare, perplexity, token_nll

TEXT = "The lamp turns, the log is written up every evening, and the kettle on the stove is warm."


class Bigram(ScriptedModel):
    """Its prediction depends on the last token alone, so a text's nll can be said in one line."""

    table = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32) * 3
    engine = SimpleNamespace(method="table")

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
        def feed(self, ids, *, all_logits=False, prompt=False):
            fed.append((len(ids), prompt))
            return super().feed(ids, all_logits=all_logits)

    model.session = lambda: Watched(model)
    whole = perplexity(Bigram(), TEXT, window=20)
    decoded = perplexity(model, TEXT, window=20, decode=True)
    assert decoded.nll == pytest.approx(whole.nll)
    assert (decoded.method, decoded.bytes_per_token) == ("table", 100)
    assert (whole.method, whole.bytes_per_token) == ("dense", None)
    assert set(fed) == {(1, False)}
    assert perplexity(model, TEXT, window=2).nll
    assert fed[-1] == (1, True)  # a window of two tokens has one to read, with all weights


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
    """A bigram whose selection halves every second row of its table."""

    blurred = Bigram.table * np.where(np.arange(300) % 2, 1, 0.5)[:, None].astype(np.float32)

    def __init__(self, **options):
        super().__init__(**options)
        self.selected = True
        self.bytes_read = 60
        self.engine = SimpleNamespace(method="blur", borrowed=self.borrowed, select=self.select)

    @contextlib.contextmanager
    def borrowed(self):
        try:
            yield
        finally:
            self.selected = True

    def select(self, selection, dense, progress):
        assert (selection, dense) == (None, True)
        progress("compiling", 0, 1)
        self.selected = False

    def logits_after(self, tokens):
        return (self.blurred if self.selected else self.table)[tokens[-1]]


def test_a_selection_that_changes_nothing():
    model = Blurred()
    model.blurred = model.table
    result = compare(model, TEXT, window=7)
    assert (result.growth, result.growth_error, result.kl, result.kl_max, result.agreement) == (0, 0, 0, 0, 1)
    assert result.ppl == result.dense_ppl == pytest.approx(perplexity(Bigram(), TEXT, window=7).ppl)


def test_comparison_by_hand():
    model, calls = Blurred(), []
    model.blurred = model.blurred.copy()
    model.blurred[:150] = model.blurred[:150, ::-1]  # another likeliest token after half of the tokens
    ids = model.tokenizer.encode(TEXT)
    result = compare(model, TEXT, window=7, progress=lambda *a: calls.append(a))
    read = [ids[i - 1] for i in range(len(ids)) if i % 7]
    p = np.exp(model.table.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    q = np.exp(model.blurred.astype(np.float64))
    q /= q.sum(axis=1, keepdims=True)
    kl = [(p[i] * np.log(p[i] / q[i])).sum() for i in read]
    assert result.kl == pytest.approx(np.mean(kl), rel=1e-5)
    found = (result.kl_median, result.kl_99, result.kl_max)
    assert found == pytest.approx((np.median(kl), np.quantile(kl, 0.99), max(kl)), rel=1e-5)
    assert 0 < result.kl_error < result.kl
    same = [p[i].argmax() == q[i].argmax() for i in read]
    assert 0 < np.mean(same) < 1
    assert result.agreement == pytest.approx(np.mean(same))
    assert result.ppl == pytest.approx(perplexity(model, TEXT, window=7).ppl)
    assert result.dense_ppl == pytest.approx(perplexity(Bigram(), TEXT, window=7).ppl)
    assert result.growth == pytest.approx(result.ppl / result.dense_ppl - 1)
    assert result.tokens == len(read)
    assert (result.method, result.bytes_per_token, result.dense_bytes_per_token) == ("blur", 60, 100)
    assert calls[0] == ("compiling", 0, 1)
    assert calls[-1] == ("measuring blur", len(read), len(read))


def test_one_window_has_no_errors():
    result = compare(Blurred(), TEXT, window=100)
    assert result.growth_error == result.kl_error == result.agreement_error == math.inf


def test_comparison_refuses_what_cannot_be_compared():
    model = Blurred()
    model.engine.method = "dense"
    with pytest.raises(ValueError, match=r"nothing is left out.*fewfire calibrate"):
        compare(model, TEXT, window=7)
    with pytest.raises(ValueError, match="context of 50"):
        compare(Blurred(context=50), TEXT, window=60)


@pytest.mark.parametrize("table", ["table", "blurred"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_comparison_of_numbers_that_are_not_finite(table, wrong):
    model = Blurred()
    setattr(model, table, np.where(np.arange(300) == 299, np.float32(wrong), model.table))
    with pytest.raises(FewfireError, match="finite"):
        compare(model, TEXT, window=7)
    assert model.selected
