"""Training text: files into windows of tokens, all of one length, without padding.

Documents (files, and what form feeds in them set apart) are joined with an end token between them and cut (sequence
packing). The same files, tokenizer and seed always give the same windows in the same order. Knows nothing of networks.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewfire.config import ModelConfig
from fewfire.tokenizer import Tokenizer

APART = "\f"  # between documents of one file


@dataclass(frozen=True, eq=False)
class Corpus:
    """Windows to train on and to measure with; no token is in both."""

    windows: np.ndarray  # (windows, T) int32
    held_out: np.ndarray  # (windows, T) int32

    @property
    def tokens(self) -> int:
        """How many there are to train on."""
        return self.windows.size

    def key(self) -> str:
        """Short hex text that changes with any token."""
        digest = hashlib.sha256(repr(self.windows.shape).encode())
        digest.update(self.windows.tobytes())
        return digest.hexdigest()[:16]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """In which order a pass over the training windows takes them, `(windows,)`."""
        return np.random.default_rng((seed, epoch)).permutation(len(self.windows))


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, or of one that gzip has packed (.gz). Raises `ValueError` if it is not UTF-8."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}): fetch it again") from None
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from None
    return [document for document in text.split(APART) if document.strip()]


def build(
    tokenizer: Tokenizer, config: ModelConfig, texts: Sequence[str], window: int, seed: int, held_out: int = 16
) -> Corpus:
    """Windows of the texts; `held_out` of them, but at most a tenth, are for measuring.

    Each begins with a BOS token where the model wants one. Special tokens that are written out in a text count as such,
    so that conversations can be trained on. Raises `ValueError` for a text without a window to train on.
    """
    first = [config.bos_token_id] if config.add_bos_token and config.bos_token_id is not None else []
    end = config.eos_token_ids[:1]
    step = window - len(first)
    ids = np.concatenate([np.array([*tokenizer.encode(text, parse_special=True), *end], np.int32) for text in texts])
    count = len(ids) // step
    if count < 2:
        raise ValueError(f"the texts have {len(ids)} tokens: at least {2 * step} are needed; give more --text")
    windows = ids[: count * step].reshape(count, step)
    if first:
        windows = np.concatenate([np.full((count, 1), first[0], np.int32), windows], axis=1)
    apart = max(1, min(held_out, count // 10))
    shuffled = windows[np.random.default_rng(seed).permutation(count)]
    return Corpus(shuffled[apart:], shuffled[:apart])
