"""Loading: packed once and then found again, options, and what is wrong said in one line."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewfire
from fewfire import model as module
from fewfire.errors import CheckpointError, FewfireError, SourceError
from fewfire.library import packed_dir
from fewfire.packed import TEMPLATE, TOKENIZER, WEIGHTS
from fewfire.quantize import FORMATS
from fewfire.team import default_threads
from tiny import prompt, write_tiny
from tiny_gguf import write_tiny_gguf

PackedPath = Callable[[str, str], Path]


@pytest.fixture
def source(tiny_path: Callable[[str], Path], own_cache: Path) -> Path:
    """A tiny model, and a cache for this test alone."""
    return tiny_path("llama")


class Stages:
    """A progress callback that remembers what was done."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.seen:
            self.seen.append(stage)

    @property
    def packed(self) -> bool:
        return any(stage.startswith("packing") for stage in self.seen)


def one_line(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_packs_once(source: Path) -> None:
    stages = Stages()
    first = fewfire.load(source, weights="q8", progress=stages)
    assert stages.packed
    assert first.path.parent == packed_dir()
    assert (first.weights, first.config.hidden_size, first.context) == ("q8", 64, 160)
    assert first.threads == default_threads()
    assert first.chat_template is not None
    stages = Stages()
    second = fewfire.load(str(source), weights="q8", threads=3, context=50, progress=stages)
    assert not stages.packed
    assert second.path == first.path
    assert (second.threads, second.context) == (3, 50)
    np.testing.assert_array_equal(first.logits(prompt(10)), second.logits(prompt(10)))
    assert fewfire.load(source, weights="q4").path != first.path
    assert len(os.listdir(packed_dir())) == 2


def test_text_and_tokens_give_the_same_logits(source: Path) -> None:
    model = fewfire.load(source, weights="f32", context=5000)
    assert model.context == 160, "not more than the model's own"
    ids = model.tokenizer.encode("The lamp turns.")
    np.testing.assert_array_equal(model.logits("The lamp turns."), model.logits(ids))
    assert model.logits(ids).shape == (len(ids), 300)


def test_a_changed_source_is_packed_anew(own_cache: Path, tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "model")
    before = fewfire.load(source, weights="f32").logits([5, 6])
    write_tiny("llama", source, seed=1)
    after = fewfire.load(source, weights="f32").logits([5, 6])
    assert np.abs(after - before).max() > 0.1


def test_a_packed_model_keeps_its_format(own_cache: Path, packed_path: PackedPath) -> None:
    for weights in FORMATS:
        model = fewfire.load(packed_path("llama", weights), weights="q4")
        assert model.weights == weights
        assert model.path == packed_path("llama", weights)
    assert not packed_dir().exists()


def test_a_gguf_file_is_the_same_model(source: Path, tmp_path: Path) -> None:
    file = write_tiny_gguf("llama", tmp_path / "model.gguf")
    ours, theirs = (fewfire.load(path, weights="f32").logits(prompt(20)) for path in (source, file))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_current_directory(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_tiny("llama", tmp_path / "here"))
    assert fewfire.load(".").packed.name == "here"


def test_threads_end_with_the_model(source: Path) -> None:
    def workers() -> int:
        return sum(t.name.startswith("fewfire-") for t in threading.enumerate())

    gc.collect()
    time.sleep(0.1)
    before = workers()
    model = fewfire.load(source, threads=4)
    session = model.session()
    session.feed(prompt(10))
    assert workers() == before + 3
    del model, session
    gc.collect()
    for _ in range(500):
        if workers() == before:
            return
        time.sleep(0.01)
    raise AssertionError(f"{workers()} workers, not {before}")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"weights": "q5"}, "'q5'"),
        ({"threads": 0}, "threads must be from 1 to 256, not 0"),
        ({"threads": 257}, "257"),
        ({"context": 0}, "context must be at least 1 token, not 0"),
        ({"context": -5}, "-5"),
    ],
)
def test_options(source: Path, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word) as error:
        fewfire.load(source, **options)
    one_line(error)
    assert not packed_dir().exists()


def test_nothing_there(own_cache: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises((SourceError, CheckpointError)) as error:
            fewfire.load(path)
        one_line(error, str(path))


def test_bad_weights_leave_nothing_in_the_cache(own_cache: Path, tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "model")
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    (source / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        fewfire.load(source)
    one_line(error, "head.weight", "NaN")
    assert os.listdir(packed_dir()) == []


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("FEWFIRE_CACHE", str(tmp_path / "file"))
    with pytest.raises(FewfireError) as error:
        fewfire.load(source)
    one_line(error, "cannot write to", str(tmp_path / "file"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_two_processes_pack_at_once(source: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The slower one takes what the faster one has made, whether it had begun or not."""
    real, calls = module.pack, 0

    def slower(path: Path, out: Path, weights: str, progress: Callable[..., None], name: str, adapter: None) -> Path:
        nonlocal calls
        calls += 1
        if when == "before":
            real(path, out, weights, name=name)

        def meanwhile(*_: object) -> None:
            if not out.exists():
                real(path, out, weights, name=name)

        return real(path, out, weights, meanwhile, name)

    monkeypatch.setattr(module, "pack", slower)
    model = fewfire.load(source)
    assert calls == 1
    assert os.listdir(packed_dir()) == [model.path.name]


@pytest.fixture
def packed(packed_path: PackedPath, tmp_path: Path) -> Path:
    """A packed model that a test may damage."""
    return Path(shutil.copytree(packed_path("llama", "q8"), tmp_path / "packed"))


def test_a_packed_model_without_a_tokenizer(packed: Path) -> None:
    (packed / TOKENIZER).unlink()
    with pytest.raises(CheckpointError) as error:
        fewfire.load(packed)
    one_line(error, str(packed), TOKENIZER, "pack the model again")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_tokenizer(packed: Path, content: bytes) -> None:
    (packed / TOKENIZER).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        fewfire.load(packed)
    one_line(error, TOKENIZER)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{% if"])
def test_a_damaged_chat_template(packed: Path, content: bytes) -> None:
    """Says so when it is read, or when it is used."""
    (packed / TEMPLATE).write_bytes(content)
    with pytest.raises(FewfireError) as error:
        fewfire.load(packed).chat([{"role": "user", "content": "hello"}], max_tokens=1)
    one_line(error, "template")


def test_truncated_weights(packed: Path) -> None:
    with (packed / WEIGHTS).open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(CheckpointError) as error:
        fewfire.load(packed)
    one_line(error, str(packed), "truncated")
