"""Text becomes windows: all tokens in order before they are shuffled, nothing twice, always the same."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny
from fewfire.checkpoint import open_checkpoint
from fewfire.config import ModelConfig
from fewfire.tokenizer import Tokenizer
from fewfire.train.corpus import Corpus, build, read_documents
from learning import sentences


@pytest.fixture(scope="module")
def config(tiny_path) -> ModelConfig:
    return open_checkpoint(tiny_path("llama")).config


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_json(tiny.tiny_tokenizer())


def rows(corpus: Corpus) -> set[tuple[int, ...]]:
    return {tuple(row) for row in (*corpus.windows.tolist(), *corpus.held_out.tolist())}


def test_windows_are_the_documents_with_an_end_between_them(tokenizer: Tokenizer, config: ModelConfig) -> None:
    texts = [sentences(30, 1), sentences(20, 2)]
    end = config.eos_token_ids[0]
    ids = [*tokenizer.encode(texts[0]), end, *tokenizer.encode(texts[1]), end]
    corpus = build(tokenizer, config, texts, 16, seed=0)
    whole = len(ids) // 16
    assert rows(corpus) == {tuple(ids[16 * i : 16 * i + 16]) for i in range(whole)}
    assert len(corpus.windows) + len(corpus.held_out) == whole
    assert len(corpus.held_out) == whole // 10


def test_windows_begin_with_bos_where_the_model_wants_it(tokenizer: Tokenizer, config: ModelConfig) -> None:
    config = replace(config, add_bos_token=True, bos_token_id=1)
    text = sentences(30)
    corpus = build(tokenizer, config, [text], 16, seed=0)
    assert (corpus.windows[:, 0] == 1).all()
    joined = sorted(rows(corpus))
    ids = tokenizer.encode(text)
    assert joined == sorted((1, *ids[15 * i : 15 * i + 15]) for i in range(len(joined)))


def test_the_seed_decides(tokenizer: Tokenizer, config: ModelConfig) -> None:
    one, same, other = (build(tokenizer, config, [sentences(200)], 16, seed) for seed in (3, 3, 4))
    assert np.array_equal(one.windows, same.windows)
    assert one.key() == same.key() != other.key()
    assert rows(one) == rows(other)
    assert sorted(one.order(0, 0)) == list(range(len(one.windows)))
    assert not np.array_equal(one.order(0, 0), one.order(0, 1))
    assert np.array_equal(one.order(7, 2), same.order(7, 2))


def test_special_tokens_written_out_count(tokenizer: Tokenizer, config: ModelConfig) -> None:
    corpus = build(tokenizer, config, ["<|im_start|>" + sentences(30)], 16, seed=0)
    assert sum((row == 1).sum() for row in (corpus.windows, corpus.held_out)) == 1


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\f\f two\n", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("drei ä".encode()))
    assert read_documents(tmp_path / "a.txt") == ["one", " two\n"]
    assert read_documents(tmp_path / "b.txt.gz") == ["drei ä"]
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_documents(tmp_path / "c.txt")
    (tmp_path / "d.gz").write_bytes((tmp_path / "b.txt.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match="whole gzip"):
        read_documents(tmp_path / "d.gz")


def test_a_text_that_is_too_short(tokenizer: Tokenizer, config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="give more --text"):
        build(tokenizer, config, ["the keeper"], 16, seed=0)
