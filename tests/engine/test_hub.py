"""Models from the hub, against a server on this machine that answers like it.

huggingface_hub reads its settings when it is imported, so each test asks in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fakehub

REPOS = {
    "o/model": {
        "config.json": b"{}",
        "tokenizer.json": b"{ }",
        "chat_template.jinja": b"hello",
        "model.safetensors": b"w" * 100_000,
        "consolidated.safetensors": b"the same again",
        "original/a.safetensors": b"and again",
        "pytorch_model.bin": b"a pickle",
        "evil.py": b"code",
    },
    "o/sharded": {
        "config.json": b"{}",
        "model-1.safetensors": b"1",
        "model-2.safetensors": b"2",
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        ).encode(),
    },
    "o/pickled": {"config.json": b"{}", "pytorch_model.bin": b"a pickle"},
    "o/gated": {"config.json": b"{}", "model.safetensors": b""},
    "o/ggufs": {"a-[q4].gguf": b"GGUF", "b.gguf": b"GGUF"},
}
ASK = """
import json, sys
from fewfire.errors import FewfireError
from fewfire.sources import resolve
for source in sys.argv[1:]:
    calls = []
    try:
        answer = str(resolve(source, lambda *a: calls.append(a)))
    except FewfireError as error:
        answer = str(error)
    print(json.dumps([answer, calls]))
"""


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """`ask(*sources, offline=...)`: what `resolve` says to each, with the calls of its progress."""
    monkeypatch.chdir(tmp_path)

    def run(*names, endpoint="http://127.0.0.1:9", offline=False):
        env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": str(int(offline))}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run([sys.executable, "-c", ASK, *names], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_download_then_offline(ask, tmp_path):
    with fakehub.serve(REPOS) as endpoint:
        (model, calls), (sharded, _), (file, _) = ask("o/model", "o/sharded", "o/ggufs:a-[q4].gguf", endpoint=endpoint)
    assert sorted(os.listdir(model)) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    size = sum(len(REPOS["o/model"][name]) for name in os.listdir(model))
    assert calls[0] == ["asking for o/model", 0, 0]
    assert calls[-1] == ["downloading o/model", size, size]
    assert Path(file).read_bytes() == b"GGUF"
    again = [answer for answer, _ in ask("o/model", "o/sharded", "o/ggufs:a-[q4].gguf", offline=True)]
    assert again == [model, sharded, file]
    unplugged = [answer for answer, _ in ask("o/model")]
    assert unplugged == [model]


def test_what_the_hub_refuses_or_lacks(ask):
    with fakehub.serve(REPOS, gated=frozenset({"o/gated"})) as endpoint:
        names = ("o/gated", "o/nosuch", "o/pickled", "o/ggufs", "o/ggufs:c.gguf")
        gated, unknown, pickled, ggufs, file = (answer for answer, _ in ask(*names, endpoint=endpoint))
    assert "o/gated is gated: accept its terms" in gated
    assert "o/nosuch is neither a path here nor a repository on the hub" in unknown
    assert "o/pickled has no *.safetensors" in pickled
    assert "name one GGUF file as owner/name:file.gguf" in ggufs
    assert "o/ggufs has no c.gguf: check the name" in file
    assert not any("\n" in answer for answer in (gated, unknown, pickled, ggufs, file))


def test_unreachable(ask):
    ((answer, _),) = ask("o/model")
    assert "neither a path here nor in the hub's cache, and the hub cannot be reached" in answer
    ((answer, _),) = ask("o/model", offline=True)
    assert answer == ("o/model is not complete in the hub's cache, and HF_HUB_OFFLINE is set: unset it and run again")


def test_offline_with_a_part_missing(ask, tmp_path):
    with fakehub.serve(REPOS) as endpoint:
        ((path, _),) = ask("o/sharded", endpoint=endpoint)
    os.unlink(os.path.join(path, "model-2.safetensors"))
    ((answer, _),) = ask("o/sharded", offline=True)
    assert "o/sharded" in answer
    assert "HF_HUB_OFFLINE is set: unset it and run again" in answer
