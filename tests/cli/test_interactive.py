import json
import stat
import sys
import time

import pytest
from safetensors.numpy import load_file, save_file

from commandline import typed
from tiny import SPECIALS, write_tiny

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a Unix terminal")
PROMPT = ">>> "


@pytest.fixture
def chat(model, own_cache):
    """A chat at a terminal, waiting for the first message."""
    with typed("chat", model, "--temperature", 0, "--max-tokens", 10) as terminal:
        terminal.wait_for("/help lists commands")
        terminal.wait_for(PROMPT)
        yield terminal


def say(chat, line: str) -> str:
    chat.type(line + "\n")
    chat.wait_for(line[-8:])  # what the terminal echoes
    return chat.wait_for(PROMPT)


def test_a_conversation(chat, tmp_path):
    first = say(chat, "Who is there?")
    assert first.strip()
    assert "--max-tokens" in first
    stats = say(chat, "/stats")
    assert "answer 10 tokens" in stats
    assert "of the weights a token" in stats
    file = tmp_path / "saved.json"
    assert "saved 2 messages" in say(chat, f"/save {file}")
    saved = json.loads(file.read_text())
    assert saved[0] == {"role": "user", "content": "Who is there?"}
    assert "exists" in say(chat, f"/save {file}")
    assert "forgotten" in say(chat, "/reset")
    assert say(chat, "Who is there?") == first
    assert "Be kind" in say(chat, "/system Be kind")
    assert say(chat, "Who is there?") != first
    chat.type("\x04")
    assert chat.ends() == 0


def test_commands_that_are_mistakes_go_on(chat):
    assert "unknown command /foo" in say(chat, "/foo")
    assert "file name" in say(chat, "/save")
    assert "No such file" in say(chat, "/save /nonexistent/folder/x")
    assert "no answer yet" in say(chat, "/stats")
    assert "/reset" in say(chat, "/help")
    chat.type("/exit\n")
    assert chat.ends() == 0


def test_several_lines_and_completion(chat, tmp_path):
    chat.type('"""\n')
    chat.wait_for("... ")
    chat.type("line one\n")
    chat.wait_for("... ")
    chat.type('line two"""\n')
    chat.wait_for(PROMPT)
    chat.type(f"/sa\t{tmp_path}/s.json\n")
    chat.wait_for("saved 2")
    chat.wait_for(PROMPT)
    assert json.loads((tmp_path / "s.json").read_text())[0]["content"] == "line one\nline two"


def interrupt(chat):
    """Ctrl-C until there is a new prompt: Python's readline misses a signal that comes before it waits again."""
    for attempt in range(10):
        time.sleep(0.3)
        chat.type("\x03")
        try:
            chat.wait_for(PROMPT, timeout=3)
            return
        except AssertionError:
            assert attempt < 9


def test_ctrl_c_at_the_prompt_drops_the_line(chat):
    chat.type("half a message")
    chat.wait_for("half a message")
    interrupt(chat)
    assert "no answer yet" in say(chat, "/stats")


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path, own_cache):
    endless = write_tiny("llama", tmp_path / "endless", max_position_embeddings=1_000_000)
    weights = load_file(endless / "model.safetensors")
    weights["lm_head.weight"][: len(SPECIALS)] = 0  # never the best: no token ends the answer
    save_file(weights, endless / "model.safetensors")
    with typed("chat", endless, "--temperature", 0, "--max-tokens", 1_000_000) as chat:
        chat.wait_for(PROMPT)
        chat.type("Go on.\n")
        chat.wait_for("Go on.\r\n")
        chat.wait_for_anything()
        chat.type("\x03")
        chat.wait_for("stopped")
        chat.wait_for(PROMPT)
        assert "answer" in say(chat, "/stats")
        chat.type("\x04")
        assert chat.ends() == 0


def test_history_is_kept_for_the_next_chat_and_private(chat, model, own_cache):
    say(chat, "Remember me")
    chat.type("\x04")
    assert chat.ends() == 0
    file = own_cache / "chat_history"
    assert "Remember me" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with typed("chat", model) as again:
        again.wait_for(PROMPT)
        again.type("\x1b[A")  # arrow up
        again.wait_for("Remember me")


def test_a_full_context_is_no_end(model, own_cache):
    with typed("chat", model, "--context", 40) as chat:
        chat.wait_for(PROMPT)
        chat.type("word " * 60 + "\n")
        assert chat.wait_for("or /reset")
        chat.wait_for(PROMPT)
        chat.type("Hi\n")
        chat.wait_for("Hi\r\n")
        chat.wait_for("the context is full")
        chat.wait_for(PROMPT)
