from types import SimpleNamespace

import pytest

from fakes import ScriptedModel
from fewfire.bench import Timing, bench
from fewfire.calibrate import sample_text


class Recorder(ScriptedModel):
    """Keeps its sessions, to see what they were fed."""

    engine = SimpleNamespace(method="gate+screen")

    def session(self):
        self.made = [*getattr(self, "made", []), super().session()]
        return self.made[-1]


def test_a_prompt_is_read_at_once_and_tokens_one_by_one():
    model = Recorder(context=20)
    timings = bench(model, prompt=7, tokens=3, repeat=2)
    assert [(t.test, t.tokens, len(t.seconds)) for t in timings] == [("pp7", 7, 2), ("tg3", 3, 2)]
    assert [[len(ids) for ids in session.fed] for session in model.made] == [[7] * 3, [1] * 9]  # one run to warm up
    assert model.made[0].fed[0] == model.made[0].fed[1]


def test_tokens_are_those_of_a_text_over_and_over():
    """A selection leaves out what a text does not need, which of random tokens is anything."""
    model = Recorder(context=10**6)
    text = model.tokenizer.encode(sample_text())
    bench(model, prompt=len(text) + 5, tokens=0, repeat=1)
    assert model.made[0].fed[0] == text + text[:5]


def test_what_decides_what_is_left_out():
    """Nothing is, of a prompt."""
    timings = bench(Recorder(), prompt=1, tokens=1, repeat=1)
    assert [(t.test, t.method) for t in timings] == [("pp1", "dense"), ("tg1", "gate+screen")]


def test_a_test_of_no_tokens_is_left_out():
    assert [t.test for t in bench(Recorder(), prompt=0, tokens=2, repeat=1)] == ["tg2"]
    assert [t.test for t in bench(ScriptedModel(), prompt=2, tokens=0, repeat=1)] == ["pp2"]


def test_statistics():
    timing = Timing("tg10", 10, (1.0, 2.0, 5.0))
    assert (timing.speeds, timing.median) == ((10.0, 5.0, 2.0), 5.0)
    assert timing.deviation == pytest.approx(4.0415, abs=1e-4)
    assert Timing("tg10", 10, (1.0,)).deviation == 0.0


@pytest.mark.parametrize(
    "options", [{"prompt": 101}, {"tokens": 101}, {"prompt": -1}, {"repeat": 0}, {"prompt": 0, "tokens": 0}]
)
def test_what_cannot_be_timed(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}"):
        bench(ScriptedModel(context=100), **{"prompt": 1, "tokens": 1} | options)
