import json

import pytest

import fewfire
from commandline import run

PROMPT = "The keeper is"


@pytest.fixture(scope="module")
def expected(model) -> str:
    return fewfire.load(model).generate(PROMPT, max_tokens=12).text


def test_prompt_from_argument_file_and_stdin(model, expected, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())  # as some editors write it
    for args, stdin in (([PROMPT], ""), (["--file", file], ""), ([], PROMPT), ([], PROMPT + "\n")):
        result = run("generate", model, *args, "--max-tokens", 12, stdin=stdin)
        assert (result.code, result.out.rstrip("\n")) == (0, expected.rstrip("\n"))


def test_json(model, expected):
    result = run("generate", model, PROMPT, "--max-tokens", 12, "--json")
    data = json.loads(result.out)
    assert data["text"] == expected
    assert (len(data["tokens"]), data["finish_reason"]) == (12, "length")
    assert data["stats"]["tokens"] == 12
    assert data["stats"]["tokens_per_second"] > 0
    assert data["stats"]["bytes_per_token"] == data["stats"]["dense_bytes_per_token"] > 0


def test_stats_go_to_stderr(model, expected):
    result = run("generate", model, PROMPT, "--max-tokens", 12, "--stats")
    assert result.out.rstrip("\n") == expected.rstrip("\n")
    assert "tokens/s; answer 12 tokens" in result.err
    assert "read 100% (" in result.err
    assert "\x1b" not in result.err


def test_seed_and_stop(model):
    options = ["--max-tokens", 30, "--temperature", 1.5, "--seed", 3, "--json"]
    first, second = (json.loads(run("generate", model, PROMPT, *options).out) for _ in range(2))
    assert first["tokens"] == second["tokens"]
    stop = first["text"][4:7]
    cut = json.loads(run("generate", model, PROMPT, *options, "--stop", stop).out)
    assert cut["text"] == first["text"][: first["text"].index(stop)]
    assert cut["finish_reason"] == "stop"


def test_context(model):
    run("generate", model, PROMPT * 5, "--context", 20).failed(1, "20", "context")
    result = run("generate", model, PROMPT, "--context", 20, "--max-tokens", 100, "--json")
    assert json.loads(result.out)["finish_reason"] == "context"


def test_threads_and_formats(model):
    for weights in ("q4", "q8", "bf16", "f32"):
        result = run("generate", model, PROMPT, "--max-tokens", 3, "--threads", 1, "--weights", weights)
        assert result.code == 0


@pytest.mark.parametrize(
    ("args", "stdin", "code", "words"),
    [
        ([""], "", 2, ["empty"]),
        ([], "", 2, ["empty"]),
        ([], b"caf\xe9", 2, ["standard input", "UTF-8", "byte 3"]),
        (["caf\udce9"], "", 2, ["Unicode"]),
        (["--file", "/nonexistent/p"], "", 1, ["/nonexistent/p: No such file"]),
        (["--file", "/"], "", 1, ["/: Is a directory"]),
        (["x", "--file", "y"], "", 2, ["not both"]),
        (["x", "--temperature", "-1"], "", 2, ["temperature", "-1"]),
        (["x", "--temperature", "nan"], "", 2, ["temperature"]),
        (["x", "--top-p", "0"], "", 2, ["top_p"]),
        (["x", "--top-p", "1.5"], "", 2, ["top_p"]),
        (["x", "--min-p", "2"], "", 2, ["min_p"]),
        (["x", "--top-k", "-3"], "", 2, ["top_k"]),
        (["x", "--repetition-penalty", "0"], "", 2, ["repetition_penalty"]),
        (["x", "--seed", "-1"], "", 2, ["seed"]),
        (["x", "--max-tokens", "0"], "", 2, ["max_tokens"]),
        (["x", "--stop", ""], "", 2, ["stop string"]),
        (["x", "--threads", "0"], "", 2, ["threads"]),
        (["x", "--context", "0"], "", 2, ["context"]),
        (["x", "--weights", "q3"], "", 2, ["q3"]),
    ],
)
def test_bad_input(model, args, stdin, code, words):
    result = run("generate", model, *args, stdin=stdin)
    result.failed(code, *words)
    assert result.out == ""


def test_bad_model(tmp_path):
    run("generate", "no-such-model", "x").failed(1, "no-such-model", "smollm2")
    run("generate", tmp_path, "x").failed(1, str(tmp_path))


def test_damaged_packed_model(model, tmp_path):
    out = tmp_path / "packed"
    assert run("pack", model, out).code == 0
    weights = out / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    run("generate", out, "x").failed(1, str(out))
    (out / "fewfire.json").write_text("{")
    run("generate", out, "x").failed(1, str(out))


def test_a_cache_that_cannot_be_written(model, monkeypatch):
    monkeypatch.setenv("FEWFIRE_CACHE", "/dev/null/cache")
    run("generate", model, "x").failed(1, "/dev/null")
    assert run("models").code == 0


def test_a_prompt_in_the_place_of_the_model_is_noticed():
    run("generate", "Once upon a time", stdin="").failed(2, "model comes first", "'Once upon a time'")
