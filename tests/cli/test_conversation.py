import json

import pytest

import fewfire
from fewfire_cli.conversation import Conversation


@pytest.fixture
def conversation(model) -> Conversation:
    return Conversation(fewfire.load(model), "Be brief.", sampling=fewfire.Sampling(), max_tokens=6, stop=())


def test_turns_are_kept_and_only_what_is_new_is_read(conversation):
    for question in ("Who?", "Why?"):
        stream = conversation.ask(question)
        list(stream)
        conversation.keep(question, stream)
    roles = [m["role"] for m in conversation.all_messages()]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.last_stats.cached_tokens > 10


def test_a_stopped_answer_is_kept_as_far_as_it_came(conversation):
    stream = conversation.ask("Who?")
    while not (text := stream.completion.text):
        next(stream)
    conversation.keep("Who?", stream)
    assert conversation.messages[-1] == {"role": "assistant", "content": text}


def test_a_turn_without_an_answer_leaves_no_trace(conversation):
    conversation.keep("Who?", conversation.ask("Who?"))
    assert conversation.messages == []
    conversation.model.context = 10
    with pytest.raises(fewfire.ContextFullError):
        conversation.ask("Who?")
    assert conversation.messages == []


def test_reset_keeps_the_system_message(conversation):
    stream = conversation.ask("Who?")
    list(stream)
    conversation.keep("Who?", stream)
    conversation.reset()
    assert conversation.all_messages() == [{"role": "system", "content": "Be brief."}]


def test_save(conversation, tmp_path):
    conversation.messages = [{"role": "user", "content": "Ünïcode 🦊\nline"}]
    conversation.save(tmp_path / "chat.json")
    assert json.loads((tmp_path / "chat.json").read_text("utf-8")) == conversation.all_messages()
    with pytest.raises(ValueError, match="exists"):
        conversation.save(tmp_path / "chat.json")
    with pytest.raises(OSError, match="No such file"):
        conversation.save(tmp_path / "none" / "chat.json")
    assert len(list(tmp_path.iterdir())) == 1
