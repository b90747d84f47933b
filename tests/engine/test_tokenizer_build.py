"""Tokenizers out of a vocabulary: the splits of each family, SentencePiece's merges, what is special."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from fewfire.errors import CheckpointError
from fewfire.tokenizer_build import SPLITS, Vocabulary, build_tokenizer, special_tokens, starts_with_bos

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def byte_level(pre: str = "gpt-2", merges: tuple[str, ...] = (), extra: dict[str, int] | None = None) -> Vocabulary:
    """Every byte, what the merges make, and further tokens with their types."""
    tokens = ALPHABET + [merge.replace(" ", "") for merge in merges] + list(extra or {})
    types = [NORMAL] * (len(ALPHABET) + len(merges)) + list((extra or {}).values())
    return Vocabulary("x.gguf", "gpt2", pre, tokens, np.array(types), None, merges, None, True)


def sentencepiece(pieces: dict[str, float], extra: dict[str, int] | None = None, prefix: bool = False) -> Vocabulary:
    """<unk>, the 256 bytes, pieces with scores, and further tokens with their types."""
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *(extra or {})]
    types = [UNKNOWN] + [BYTE] * 256 + [NORMAL] * len(pieces) + list((extra or {}).values())
    scores = np.array([0.0] * 257 + list(pieces.values()) + [-1000.0] * len(extra or {}), np.float32)
    return Vocabulary("x.gguf", "llama", "default", tokens, np.array(types), scores, (), 0, prefix)


def words(vocabulary: Vocabulary, text: str) -> list[str]:
    """How text is cut before the merges."""
    splitter = Tokenizer.from_str(build_tokenizer(vocabulary)).pre_tokenizer
    assert splitter is not None
    return [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["I", "'ll", " pay", " 1234", " EUR", "...", "  ", " ok", "\n", "\n", "x"]),
        ("smollm", ["I", "'ll", " pay", " ", "1", "2", "3", "4", " EUR", "...", "  ", " ok", "\n", "\n", "x"]),
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "4", " EUR", "...", "  ", " ok", "\n\n", "x"]),
        ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", " EUR", "...", "  ", " ok", "\n\n", "x"]),
        ("tekken", ["I", "'ll", " pay", " ", "1", "2", "3", "4", " EUR", "...", "  ", " ok", "\n\n", "x"]),
    ],
)
def test_splits(pre: str, expected: list[str]) -> None:
    assert words(byte_level(pre), "I'll pay 1234 EUR...   ok\n\nx") == expected


def test_splits_that_differ_by_case_and_line_ends() -> None:
    assert words(byte_level("gpt-2"), "DON'T") == ["DON", "'", "T"]
    assert words(byte_level("llama-bpe"), "DON'T") == ["DON", "'T"]
    assert words(byte_level("tekken"), "camelCase") == ["camel", "Case"]
    assert words(byte_level("llama-bpe"), "a;\r\nb") == ["a", ";\r\n", "b"]


@pytest.mark.parametrize("pre", SPLITS)
def test_any_text_survives(pre: str) -> None:
    tokenizer = Tokenizer.from_str(build_tokenizer(byte_level(pre, ("a b", "ab c"))))
    for text in ("", " ", "abc abc\n\tabc  ", "é 中文 🎉", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_merges_in_their_order() -> None:
    vocabulary = byte_level(merges=("b c", "a b", "a bc"))
    tokenizer = Tokenizer.from_str(build_tokenizer(vocabulary))
    assert tokenizer.encode("abcab").tokens == ["abc", "ab"]


def test_whole_words_need_no_merges() -> None:
    """Llama 3 has words that its merges do not reach."""
    for pre, expected in (("gpt-2", ["a", "b"]), ("llama-bpe", ["ab"])):
        vocabulary = byte_level(pre, extra={"ab": NORMAL})
        assert Tokenizer.from_str(build_tokenizer(vocabulary)).encode("ab").tokens == expected


def test_qwen_composes_characters() -> None:
    for pre, count in (("gpt-2", 3), ("qwen2", 2)):
        tokenizer = Tokenizer.from_str(build_tokenizer(byte_level(pre)))
        assert len(tokenizer.encode("e\N{COMBINING ACUTE ACCENT}").ids) == count


def test_added_tokens() -> None:
    extra = {"<s>": CONTROL, "<think>": USER, "  ": USER, "<|im_end|>": USER, "[PAD]": UNUSED}
    vocabulary = byte_level(extra=extra)
    tokenizer = Tokenizer.from_str(build_tokenizer(vocabulary))
    assert tokenizer.encode("<s>a<think>  b[PAD]").tokens[:5] == ["<s>", "a", "<think>", "  ", "b"]
    added = tokenizer.get_added_tokens_decoder().values()
    assert {token.content: token.special for token in added} == {
        "<s>": True,
        "<think>": False,
        "  ": False,
        "<|im_end|>": True,  # a message must not be able to forge it, whatever the file calls it
    }
    assert [tokenizer.token_to_id(token) for token in vocabulary.tokens] == list(range(len(vocabulary.tokens)))
    assert vocabulary.types is not None
    assert list(special_tokens(vocabulary.tokens, vocabulary.types)) == ["<s>", "<|im_end|>"]


def test_repeated_and_empty_tokens_keep_their_ids() -> None:
    vocabulary = byte_level()
    vocabulary = replace(vocabulary, tokens=[*vocabulary.tokens, "", "a", "a", "last"], types=None)
    tokenizer = Tokenizer.from_str(build_tokenizer(vocabulary))
    assert tokenizer.get_vocab_size() == len(vocabulary.tokens)
    assert tokenizer.token_to_id("a") == ALPHABET.index("a")
    assert tokenizer.token_to_id("last") == len(vocabulary.tokens) - 1
    json.loads(build_tokenizer(vocabulary))


PIECES = {"▁": -1, "a": -2, "b": -3, "c": -4, "ab": -10, "bc": -5, "▁a": -20, "abc": -30, "\n": -9}


def test_sentencepiece_merges_by_score() -> None:
    tokenizer = Tokenizer.from_str(build_tokenizer(sentencepiece(PIECES)))
    assert tokenizer.encode("abc").tokens == ["abc"]
    assert tokenizer.encode("abab").tokens == ["ab", "ab"]
    assert tokenizer.encode("bbc").tokens == ["b", "bc"]
    assert tokenizer.encode("b ab").tokens == ["b", "▁", "ab"]  # ab before ▁a: -10 is more than -20
    assert tokenizer.encode("b a").tokens == ["b", "▁a"]


def test_sentencepiece_falls_back_to_bytes() -> None:
    tokenizer = Tokenizer.from_str(build_tokenizer(sentencepiece(PIECES)))
    assert tokenizer.encode("aé").tokens == ["a", "<0xC3>", "<0xA9>"]
    for text in ("aé b", " a  b ", "🎉\n", "", "\t"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_sentencepiece_with_a_space_before_the_text() -> None:
    tokenizer = Tokenizer.from_str(build_tokenizer(sentencepiece(PIECES, prefix=True)))
    assert tokenizer.encode("a").tokens == ["▁a"]
    assert tokenizer.decode(tokenizer.encode("a b").ids) == "a b"
    assert tokenizer.decode(tokenizer.encode(" a").ids) == " a"


def test_sentencepiece_added_tokens() -> None:
    """User-defined spaces are found in the text as spaces; the longest wins."""
    extra = {"<eos>": CONTROL, "▁▁": USER, "▁▁▁": USER, "\n\n": USER}
    tokenizer = Tokenizer.from_str(build_tokenizer(sentencepiece(PIECES, extra)))
    first = 257 + len(PIECES)
    ids = tokenizer.encode("a   b\n\n<eos>").ids
    assert ids == [258, first + 2, 259, first + 3, first]
    assert tokenizer.decode(ids) == "a   b\n\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a   b\n\n<eos>"


def test_merges_of_a_large_vocabulary_are_quick() -> None:
    random = np.random.RandomState(0)
    letters = [chr(ord("a") + i) for i in range(26)]
    pieces = dict.fromkeys(letters, 0.0)
    while len(pieces) < 50_000:
        pieces["".join(random.choice(letters, size=random.randint(2, 9)))] = -float(len(pieces))
    start = time.perf_counter()
    build_tokenizer(sentencepiece(pieces))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer 't5' is not supported; supported: gpt2, llama"),
        ({"pre": "gpt-5"}, "pre-tokenizer 'gpt-5' is not supported; supported: default, gpt-2, smollm"),
        ({"tokens": [], "types": None}, "no tokens"),
        ({"merges": ["a zz"]}, "the merge 'a zz' has no token"),
        ({"merges": ["ab"]}, "the merge 'ab' has no token"),
        ({"model": "llama"}, "no scores or token types"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^x.gguf: .*{message}") as caught:
        build_tokenizer(replace(byte_level(), **changes))
    assert "\n" not in str(caught.value)


def test_begin_token_where_the_file_does_not_say() -> None:
    assert starts_with_bos("llama", "default")
    assert starts_with_bos("gpt2", "llama-bpe")
    assert not starts_with_bos("gpt2", "smollm")
    assert not starts_with_bos("gpt2", "unheard-of")
    assert not starts_with_bos("", "default")
