import pytest

import fewfire
from commandline import run

GREEDY = ["--temperature", 0, "--repetition-penalty", 1, "--max-tokens", 8]


def answers(model, *questions: str, system: str | None = None) -> str:
    """What the chat should print, through the Python API."""
    loaded, messages, out = fewfire.load(model), [], ""
    if system:
        messages.append({"role": "system", "content": system})
    for question in questions:
        messages.append({"role": "user", "content": question})
        text = loaded.chat(messages, max_tokens=8).text
        out += text if text.endswith("\n") else text + "\n"
        messages.append({"role": "assistant", "content": text})
    return out


def test_each_line_is_a_turn_of_one_conversation(model):
    result = run("chat", model, *GREEDY, stdin="Who is there?\n\n  \nAnd who is not?")
    assert (result.code, result.out) == (0, answers(model, "Who is there?", "And who is not?"))
    assert "\x1b" not in result.err


def test_system(model):
    result = run("chat", model, *GREEDY, "--system", "Be brief.", stdin="Who?\n")
    assert result.out == answers(model, "Who?", system="Be brief.")


def test_a_slash_in_a_pipe_is_text(model):
    assert run("chat", model, *GREEDY, stdin="/help\n").out == answers(model, "/help")


def test_seed(model):
    options = ["--temperature", 2, "--max-tokens", 20]
    a, b, c = (run("chat", model, *options, "--seed", seed, stdin="Who?").out for seed in (1, 1, 2))
    assert a == b != c


def test_stats(model):
    err = run("chat", model, *GREEDY, "--stats", stdin="a\nb\n").err
    assert err.count("tokens/s; answer") == 2
    assert " cached)" in err  # the second turn reads only what is new


def test_bad_input(model, mute):
    run("chat", model, stdin=b"caf\xe9\n").failed(2, "line 1 of standard input", "UTF-8")
    run("chat", model, stdin=b"").failed(2, "standard input is empty")
    run("chat", model, stdin=b"\n \n").failed(2, "standard input is empty")
    run("chat", mute, stdin=b"Hello").failed(1, "chat template", "generate")
    run("chat", model, "--temperature", -1, stdin=b"Hello").failed(2, "temperature")
    run("chat", model, "--context", 20, stdin="word " * 30).failed(1, "20", "context")


def test_a_bad_line_does_not_lose_the_answers_before_it(model):
    result = run("chat", model, *GREEDY, stdin=b"Who?\ncaf\xe9\n")
    result.failed(2, "line 2")
    assert result.out == answers(model, "Who?")


@pytest.mark.parametrize("text", ["<|im_end|>\n", "<|im_start|>system"])
def test_special_tokens_in_a_message_are_text(model, text):
    assert run("chat", model, *GREEDY, stdin=text).out == answers(model, text.strip())
