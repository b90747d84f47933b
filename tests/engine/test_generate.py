import dataclasses
import itertools
import random

import pytest

from fakes import BOS, EOS, ScriptedModel
from fewfire.errors import ContextFullError
from fewfire.generate import Piece, StopFilter, common_prefix, prompt_ids, stream
from fewfire.sampling import Sampling

STORY = "The keeper is in the boat, and the lamp turns. Über den Bergen 🦊🦊 liegt Schnee."


def complete(*args, **options):
    return stream(*args, **options).read()


def run(script=STORY, prompt=(5,), **options):
    context = options.pop("context", 200)
    return complete(ScriptedModel(script, prompt=len(prompt), context=context), prompt, **options)


def test_text_tokens_and_reason_of_an_answer_that_ends():
    model = ScriptedModel(STORY, prompt=3)
    result = complete(model, [5, 6, 7])
    assert result.text == STORY
    assert result.token_ids == model.script
    assert result.finish_reason == "stop"
    assert dataclasses.astuple(result.stats)[:2] == (3, 0)
    assert result.stats.tokens == result.stats.steps == len(model.script)
    assert result.stats.tokens_per_second > 0


def test_pieces_join_to_the_text_and_are_never_half_a_character():
    pieces = list(stream(ScriptedModel(STORY), [5]))
    assert "".join(p.text for p in pieces) == STORY
    assert not any("\ufffd" in p.text for p in pieces)
    assert [p.token_id for p in pieces if p.token_id is not None] == ScriptedModel(STORY).script


def test_length():
    result = run(max_tokens=4)
    assert (len(result.token_ids), result.finish_reason, result.stats.steps) == (4, "length", 3)
    assert STORY.startswith(result.text)


def test_length_in_the_middle_of_a_character_says_so():
    assert run("🦊", max_tokens=2).text == "\ufffd"


def test_an_answer_that_ends_at_once_is_empty():
    result = run([EOS])
    assert (result.text, result.token_ids, result.finish_reason) == ("", [], "stop")
    assert result.stats.tokens_per_second == 0.0


@pytest.mark.parametrize("stop", [["boat,"], ["nothing", "boat, and"], "boat", ["and", "boat, and the"]])
def test_stop_strings_across_tokens(stop):
    pieces = list(stream(ScriptedModel(STORY), [5], stop=stop))
    text = "".join(p.text for p in pieces)
    assert text == "The keeper is in the " + ("boat, " if "and" in stop else "")
    shown = list(itertools.accumulate(p.text for p in pieces))
    assert all("The keeper is in the boat, ".startswith(s) for s in shown)


def test_a_stop_string_that_never_completes_is_text():
    result = run(stop=["Schnee. Und"])
    assert result.text == STORY
    assert run(stop=["Schnee. Und"], max_tokens=10).text == run(max_tokens=10).text


def test_stop_string_completed_by_the_last_token():
    assert run("a b", stop=["b"], max_tokens=len(ScriptedModel("a b").script)).finish_reason == "stop"


def test_context_full_while_generating_is_a_reason_and_not_an_exception():
    result = run(prompt=(5,) * 10, context=14)
    # four are fed, and the logits after the last one still give a fifth
    assert (len(result.token_ids), result.finish_reason) == (5, "context")
    assert run(prompt=(5,) * 14, context=14).finish_reason == "context"


def test_a_prompt_that_does_not_fit_says_both_numbers():
    with pytest.raises(ContextFullError, match=r"15 tokens .* 14"):
        stream(ScriptedModel(context=14), [5] * 15)


def test_empty_prompt():
    with pytest.raises(ValueError, match="empty"):
        complete(ScriptedModel(), "")
    with pytest.raises(ValueError, match="empty"):
        complete(ScriptedModel(), [])
    assert prompt_ids(ScriptedModel(add_bos_token=True), "") == [BOS]


def test_prompt_ids_adds_bos_once_and_knows_written_special_tokens():
    model = ScriptedModel(add_bos_token=True)
    assert prompt_ids(model, "lamp")[0] == BOS
    assert prompt_ids(model, "<|im_start|>lamp") == prompt_ids(model, "lamp")
    assert prompt_ids(ScriptedModel(), "<|im_start|>lamp") == prompt_ids(model, "lamp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": [5, 300]}, "token id 300"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": "caf\udce9"}, "Unicode at character 3"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": [""]}, "stop string"),
        ({"stop": [3]}, "stop string"),
        ({"session": ScriptedModel().session()}, "another model"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_computed(options, message):
    prompt = options.pop("prompt", [5])
    with pytest.raises(ValueError, match=message) as caught:
        stream(ScriptedModel(STORY), prompt, **options)
    assert "\n" not in str(caught.value)


def test_a_cached_prefix_is_not_computed_again():
    model = ScriptedModel(STORY, prompt=3)
    session = model.session()
    complete(model, [5, 6, 7], session=session, max_tokens=3)
    assert session.tokens == [5, 6, 7, *model.script[:2]]
    session.fed.clear()
    result = complete(model, [5, 6, 7], session=session, max_tokens=1)
    assert (result.stats.cached_tokens, session.fed) == (2, [[7]])  # one is computed for its logits
    session.fed.clear()
    result = complete(model, [5, 8, 9, 10], session=session, max_tokens=1)
    assert (result.stats.cached_tokens, session.fed) == (1, [[8, 9, 10]])


def test_a_dropped_stream_leaves_the_session_consistent():
    model = ScriptedModel(STORY, prompt=3)
    session = model.session()
    answer = stream(model, [5, 6, 7], session=session)
    assert session.tokens == []  # nothing is computed until it is asked for
    first = next(answer)
    next(answer)
    answer.close()
    assert answer.completion.finish_reason == "cancelled"
    assert answer.completion.text.startswith(first.text)
    assert session.tokens == [5, 6, 7, model.script[0]]
    assert list(answer) == []
    assert complete(model, [5, 6, 7], session=session).text == STORY


def test_completion_is_there_from_the_beginning():
    assert stream(ScriptedModel(STORY), [5]).completion.finish_reason == "cancelled"


def test_seed_reproduces_a_whole_text():
    def draw(seed):
        sampling = Sampling(temperature=30.0, seed=seed)  # so hot that the script is but a hint
        return run(sampling=sampling, max_tokens=20).token_ids

    assert draw(1) == draw(1) != draw(2)


def test_penalty_sees_the_answer_and_not_the_prompt():
    model = ScriptedModel([5, 5, 5], prompt=1)
    result = complete(model, [5], sampling=Sampling(repetition_penalty=1e9), max_tokens=3)
    assert result.token_ids == [5, 0, 1]


def first_stop(text: str, stops: list[str]) -> str:
    """What StopFilter should let through, found by looking at every beginning of the text."""
    for end in range(len(text) + 1):
        hits = [end - len(s) for s in stops if text[:end].endswith(s)]
        if hits:
            return text[: min(hits)]
    return text


def test_stop_filter_does_not_depend_on_how_the_text_is_cut():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=rng.randrange(12)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        cuts = sorted(rng.choices(range(len(text) + 1), k=3))
        parts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        held = StopFilter(stops)
        out = "".join(held.push(part) for part in parts) + held.finish()
        assert out == first_stop(text, stops), (parts, stops)
        assert held.stopped == any(s in text for s in stops)


def test_stop_filter_shows_what_can_be_no_beginning():
    held = StopFilter(["END"])
    assert [held.push(t) for t in ("a", "bE", "N", "x", "E", "ND", "z")] == ["a", "b", "", "ENx", "", "", ""]


def test_common_prefix():
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 9, 3]) == 1


def test_piece_is_plain_data():
    assert Piece("a", 1) == Piece("a", 1)
