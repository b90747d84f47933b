"""Building a tokenizer.json from the vocabulary that a GGUF file carries.

Promises the token ids that the model's own tokenizer.json gives, for byte-level BPE (GPT-2, Llama 3, Qwen,
SmolLM) and for SentencePiece BPE (Llama 2, Mistral, Gemma), with what each family splits text at before the
merges. Knows nothing of GGUF: it is handed a `Vocabulary`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fewfire.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
_ADDED = (UNKNOWN, CONTROL, USER_DEFINED)

# Some files call these user-defined, yet a message's text must not be able to forge them.
CHAT_MARKERS = {"<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"} | {
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>"
}  # fmt: skip

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


@dataclass(frozen=True)
class Split:
    """How text is cut before the merges. No pattern is that of GPT-2, which `tokenizers` has built in."""

    pattern: str = ""
    digits: bool = False  # every digit alone, first of all
    nfc: bool = False  # Unicode composition before everything
    whole_words: bool = False  # a word in the vocabulary needs no merges
    bos: bool = False  # the text begins with the begin token where the file does not say


_GPT2, _DIGITS = Split(), Split(digits=True)
_LLAMA3_SPLIT = Split(_LLAMA3, whole_words=True, bos=True)
_QWEN2_SPLIT = Split(_QWEN2, nfc=True)
SPLITS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": Split(_QWEN2),
    "tekken": Split(_TEKKEN, whole_words=True, bos=True),
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about its tokenizer; `types` and `scores`, if any, have one entry per token."""

    where: str
    model: str  # "gpt2": byte-level BPE; "llama": SentencePiece
    pre: str
    tokens: Sequence[str]
    types: np.ndarray | None
    scores: np.ndarray | None
    merges: Sequence[str]
    unknown: int | None
    space_prefix: bool


def starts_with_bos(model: str, pre: str) -> bool:
    """Whether texts begin with the begin token where the file does not say: llama.cpp's rule."""
    return model == "llama" or (model == "gpt2" and pre in SPLITS and SPLITS[pre].bos)


def build_tokenizer(vocabulary: Vocabulary) -> str:
    """The contents of a tokenizer.json. Raises `CheckpointError`."""
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if vocabulary.model not in builders:
        raise CheckpointError(
            f"{vocabulary.where}: tokenizer {vocabulary.model[:40]!r} is not supported; supported: gpt2, llama"
        )
    if not vocabulary.tokens:
        raise CheckpointError(f"{vocabulary.where}: the tokenizer has no tokens: the file is damaged")
    tokenizer = builders[vocabulary.model](vocabulary)
    if vocabulary.types is not None:
        added = [i for i, kind in enumerate(vocabulary.types.tolist()) if kind in _ADDED]
        special = special_tokens(vocabulary.tokens, vocabulary.types)
        texts = _texts(vocabulary)
        tokens = [AddedToken(texts[i], special=texts[i] in special, normalized=False) for i in added]
        tokenizer.add_special_tokens([token for token in tokens if token.special])
        tokenizer.add_tokens([token for token in tokens if not token.special])
    return tokenizer.to_str()


def special_tokens(tokens: Sequence[str], types: np.ndarray) -> dict[str, int]:
    """The tokens that steer the model and are no text, with their ids."""
    return {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types.tolist(), strict=False))
        if kind in (CONTROL, UNKNOWN) or (kind == USER_DEFINED and token in CHAT_MARKERS)
    }


def _texts(vocabulary: Vocabulary) -> list[str]:
    """Every token's text, no two alike: what repeats another or is empty can never be the token of a text.

    Added tokens are found in the raw text, before SentencePiece writes spaces as U+2581.
    """
    spaces = "▁" if vocabulary.model == "llama" else " "
    kinds = [NORMAL] * len(vocabulary.tokens) if vocabulary.types is None else vocabulary.types.tolist()
    texts: list[str] = []
    seen: set[str] = set()
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, kinds, strict=True)):
        text = token.replace(spaces, " ") if kind in _ADDED else token
        if not text or text in seen:
            text = f"[UNUSED_{i}]"
        seen.add(text)
        texts.append(text)
    return texts


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """Byte-level BPE, as in GPT-2 and most later models."""
    split = SPLITS.get(vocabulary.pre)
    if split is None:
        raise CheckpointError(
            f"{vocabulary.where}: pre-tokenizer {vocabulary.pre[:40]!r} is not supported; "
            f"supported: {', '.join(SPLITS)}"
        )
    ids = {token: i for i, token in enumerate(_texts(vocabulary))}
    merges = []
    for merge in vocabulary.merges:
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(f"{vocabulary.where}: the merge {merge[:40]!r} has no token: the file is damaged")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=split.whole_words))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece BPE: merges ranked by the score of what they make, single bytes for what is not in it."""
    if vocabulary.scores is None or vocabulary.types is None:
        raise CheckpointError(f"{vocabulary.where}: the tokenizer has no scores or token types: the file is damaged")
    texts = _texts(vocabulary)
    ids = {token: i for i, token in enumerate(texts)}
    unknown = None if vocabulary.unknown is None else texts[vocabulary.unknown]
    merges = _merges_from_scores(texts, vocabulary.scores, vocabulary.types)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(tokens: Sequence[str], scores: np.ndarray, types: np.ndarray) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best score first.

    The order of transformers' SentencePiece converter: ties by the longer left part, then by token id.
    """
    normal = {tokens[i]: i for i in np.flatnonzero(types == NORMAL).tolist()}
    found = array("i")  # whole, left, right: as objects, Gemma's half a million would take 200 MB
    for token, i in normal.items():
        for cut in range(1, len(token)):
            left, right = normal.get(token[:cut]), normal.get(token[cut:])
            if left is not None and right is not None:
                found.extend((i, left, right))
    whole, left_ids, right_ids = np.asarray(found, dtype=np.intp).reshape(-1, 3).T
    lengths = np.array([len(token) for token in tokens])
    order = np.lexsort(
        (right_ids, left_ids, -lengths[right_ids], -lengths[left_ids], -scores[whole].astype(np.float64))
    )
    return [(tokens[left_ids[n]], tokens[right_ids[n]]) for n in order]
