import importlib.util
import json
import shlex
import signal
import subprocess
import time

import numpy as np
import pytest

import tiny
import tiny_gguf
from commandline import PROGRAM, run
from fewfire import sources
from fewfire.adapter import Adapted, open_adapter
from fewfire.checkpoint import open_checkpoint

if importlib.util.find_spec("torch") is None:

    def test_it_says_what_is_missing(model, tmp_path):
        run("train", "relufy", model, tmp_path / "out", "--text", "no.txt").failed(1, "pip install 'fewfire[train]'")

    pytest.skip("needs the `train` extra", allow_module_level=True)

SMALL = ("--window", 32, "--batch", 4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.PARAGRAPH * 12)
    return path


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("relufy", ("--rank", 3, "--sparsity", 0.7, "--layerwise", 0.5)),
        ("relufy", ("--activation", "relu", "--l1", 1, "--labels", 0.5, "--stage", 2)),
        ("relufy", ("--activation", "shifted", "--shift", 0.3, "--adapter")),
        ("relufy", ("--rank", 3, "--down")),
        ("relufy", ("--down", "--reconstruct", "--adapter")),
        ("relufy", ("--activation", "centred", "--sparsity", 0.7, "--down", "--reconstruct", "--adapter")),
        ("relufy", ("--reconstruct", "--sparsity", 0.7, "--adapter")),
        ("topk", ("--sparsity", 0.9)),
        ("lte", ("--sparsity", 0.5, "--efficiency", 1)),
        ("plain", ("--labels", 1)),
        ("plain", ("--labels", 1, "--bf16")),
    ],
)
def test_from_training_to_generating(model, text, tmp_path, method, options):
    out = tmp_path / "out"
    result = run("train", method, model, out, "--text", text, "--tokens", 1500, *SMALL, *options)
    assert result.code == 0, result
    assert result.out.startswith("zeros ")
    assert "against the original's" in result.out
    entries = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, 12))
    assert not (out / "training" / "state.pt").exists()
    assert f"`fewfire train {method}`" in (out / "README.md").read_text()
    assert (out / "adapter.safetensors").exists() == ("--rank" in options or "--adapter" in options)
    said = run("generate", out, "The keeper is", "--max-tokens", 8, "--weights", "f32", "--json")
    assert json.loads(said.out)["stats"]["tokens"] if said.code == 0 else said
    again = run("train", method, model, out, "--text", text, "--tokens", 1500, *SMALL, *options)
    again.failed(2, "has a model already")


def test_held_out_text_is_measured(model, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, and again: " * 40)
    found = []
    for options in ((), ("--heldout", other)):
        out = tmp_path / f"out{len(options)}"
        run("train", "topk", model, out, "--text", text, "--tokens", 128, *SMALL, *options)
        found.append(json.loads((out / "training" / "log.jsonl").read_text().splitlines()[0])["original"])
    assert found[0] != found[1]


def test_curves_are_drawn(model, text, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the `plot` extra")
    picture = tmp_path / "curves.png"
    result = run("train", "topk", model, tmp_path / "out", "--text", text, "--tokens", 500, *SMALL, "--plot", picture)
    assert f"wrote {picture}" in result.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(model, text, tmp_path):
    args = ["train", "relufy", model, tmp_path / "out", "--text", text, "--tokens", 10**8, *SMALL]
    program = subprocess.Popen([*PROGRAM, *map(str, args)], stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "out" / "training" / "log.jsonl", time.monotonic() + 120
    try:
        while not log.exists() or log.read_text().count("\n") < 4:
            assert program.poll() is None, program.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == 130
    assert errors.rstrip().splitlines()[-1].endswith("stopped; the same command goes on from here")
    assert (tmp_path / "out" / "training" / "state.pt").exists()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--sparsity", 1.5), 2, ["--sparsity must be between 0 and 1"]),
        (("--tokens", 0), 2, ["--tokens must be at least 1"]),
        (("--rank", 4096, "--window", 32), 2, ["rank must be"]),
        (("--rank", 3, "--reconstruct"), 2, ["leave --rank out"]),
        (("--rank", 3, "--adapter"), 2, ["leave --adapter out"]),
        (("--activation", "relu", "--sparsity", 0.9, "--reconstruct"), 2, ["ReLU's own zeros"]),
        (("--rank", 3, "--start", "some.safetensors"), 2, ["leave --rank out"]),
        (("--start", "missing.safetensors"), 1, ["missing.safetensors"]),
        (("--labels", 2), 2, ["--labels must be from 0 to 1"]),
        (("--l1", -1), 2, ["--l1 must be 0 or more"]),
        (("--window", 200), 2, ["longer than the model's"]),
        (("--heldout", "missing.txt"), 1, ["missing.txt"]),
    ],
)
def test_mistakes(model, text, tmp_path, args, code, words):
    run("train", "relufy", model, tmp_path / "out", "--text", text, *args).failed(code, *words)
    assert not (tmp_path / "out" / "config.json").exists()


def test_only_relufys_adapters_are_gone_on_from(model, text, tmp_path):
    """A bypass follows from the original's matrices, and those that plain has moved would give another."""
    command = ("--text", text, "--tokens", 256, "--adapter", *SMALL)
    assert run("train", "plain", model, tmp_path / "plain", *command).code == 0
    start = tmp_path / "plain" / "adapter.safetensors"
    run("train", "relufy", model, tmp_path / "out", "--start", start, *command).failed(2, "is by plain")


@pytest.mark.parametrize("option", [("--reconstruct",), ("--start", "some.safetensors")])
@pytest.mark.parametrize("method", ["topk", "lte", "plain"])
def test_what_only_relufy_can(method, option, model, text, tmp_path):
    result = run("train", method, model, tmp_path / "out", "--text", text, *option, *SMALL)
    result.failed(2, f"{option[0]} is for relufy")


def test_a_training_goes_on_from_an_adapter(model, text, tmp_path):
    """With a rate of nearly nothing the result is what the first training left."""
    first, second = tmp_path / "first", tmp_path / "second"
    command = ("--text", text, "--sparsity", 0.7, "--down", "--adapter", *SMALL)
    assert run("train", "relufy", model, first, "--tokens", 1500, "--rate", 1e-3, *command).code == 0
    start = ("--start", first / "adapter.safetensors", "--tokens", 384)
    assert run("train", "relufy", model, second, *start, "--rate", 1e-20, *command).code == 0
    earlier = open_adapter(first / "adapter.safetensors")
    merged, found, base = Adapted(open_checkpoint(model), earlier), open_checkpoint(second), open_checkpoint(model)
    for name in ("layers.1.down.weight", "layers.0.ffn_norm.weight", "layers.1.up.bias"):
        np.testing.assert_allclose(found.read(name), merged.read(name), atol=1e-3)
        assert name not in base.config.shapes() or np.abs(found.read(name) - base.read(name)).max() > 3e-3
    about = open_adapter(second / "adapter.safetensors").about
    assert about["tokens"] == earlier.about["tokens"] + 384
    card = (second / "README.md").read_text()
    assert (
        f"went on from adapter.safetensors, on which an earlier training had spent {earlier.about['tokens']:,}" in card
    )
    assert "--start adapter.safetensors" in card
    log = (second / "training" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["zeros"] == pytest.approx(0.7, abs=0.1)  # from the first step on


def test_texts_that_cannot_be_used(model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    run("train", "relufy", model, tmp_path / "out", "--text", short).failed(2, "give more --text")
    run("train", "relufy", model, tmp_path / "out", "--text", tmp_path / "none.txt").failed(1, "none.txt")
    run("train", "relufy", model, tmp_path / "out").failed(2, "--text")


def test_an_alias_with_an_adapter_is_not_trained_again(text, tmp_path, monkeypatch):
    alias = sources.AdaptedModel("tiny-relu", "a test", "smollm2", "tiny-relu.safetensors")
    monkeypatch.setattr(sources, "ADAPTED", {alias.name: alias})
    run("train", "relufy", "tiny-relu", tmp_path / "out", "--text", text).failed(2, "name the model that it was made")


def test_a_gguf_that_leaves_only_an_adapter_says_so_at_once(text, tmp_path):
    gguf, out = tiny_gguf.write_tiny_gguf("llama-llama3", tmp_path / "model.gguf"), tmp_path / "out"
    command = ("train", "relufy", gguf, out, "--text", text, "--tokens", 300, *SMALL)
    run(*command).failed(1, "--rank or --adapter")
    assert not out.exists()
    trained = run(*command, "--rank", 3)
    assert trained.code == 0, trained
    assert sorted(path.name for path in out.iterdir()) == ["adapter.safetensors", "training"]
    adapter = (out / "adapter.safetensors").read_bytes()
    (use,) = (line for line in trained.err.splitlines() if line.startswith("only an adapter was written"))
    program, *words = shlex.split(use.partition("to use it: ")[2])
    assert program == "fewfire"
    assert run(*(tmp_path / "packed" if word == "PACKED" else word for word in words)).code == 0
    run(*command, "--rank", 3).failed(2, "has an adapter already")
    assert (out / "adapter.safetensors").read_bytes() == adapter


def test_gelu_models_cannot_have_thresholds(tiny_path, text, tmp_path):
    result = run("train", "relufy", tiny_path("gemma3"), tmp_path / "out", "--text", text, *SMALL)
    result.failed(2, "--activation relu")
