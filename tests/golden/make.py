"""Makes the stored outputs in this directory from transformers. Run it from the root of the repository:

    python tests/golden/make.py

tiny.npz: per family of tiny.py, the logits after the last token of `prompt(64)`.
smollm2.npz: for five prompts, the 64 likeliest next tokens one after the other, by how much each of them won,
and the twenty best logits at eight positions. They come from transformers with the weights that we dequantise
from the GGUF file, so they witness everything but our reading of that file; llama.cpp witnesses that.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tokenizers import Tokenizer  # noqa: E402

import peers  # noqa: E402
from fewfire.checkpoint import open_checkpoint  # noqa: E402
from fewfire.sources import resolve  # noqa: E402
from tiny import FAMILIES, prompt, write_tiny  # noqa: E402

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = (
    CHAT.format("What is the capital of France?"),
    CHAT.format("Write a short story about a lighthouse keeper and a storm."),
    "The three states of matter are solid, liquid and gas. In a solid, the particles",
    "def fibonacci(n):\n",
    "In 1969, the first humans landed on the Moon. The mission was called",
)
CONTINUE = 64


def make_tiny(path: Path) -> None:
    """Every family once."""
    last: dict[str, Any] = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            model = peers.from_directory(write_tiny(family, Path(directory)))
            last[family] = peers.logits(model, prompt(64))[-1]
    np.savez_compressed(path, **last)


def make_smollm2(path: Path) -> None:
    """The real model."""
    checkpoint = open_checkpoint(resolve("smollm2"))
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json())
    model = peers.transformers_model(checkpoint)
    out: dict[str, Any] = {"n": np.array(len(PROMPTS))}
    for i, text in enumerate(PROMPTS):
        start = tokenizer.encode(text, add_special_tokens=False).ids
        continuation = peers.greedy(model, start, CONTINUE)
        print(repr(text + tokenizer.decode(continuation, skip_special_tokens=False)))
        logits = peers.logits(model, start + continuation)
        positions = np.linspace(0, len(logits) - 1, 8).astype(np.int32)
        best_two = np.sort(logits[len(start) - 1 : -1], axis=-1)[:, -2:]
        top = np.argsort(-logits[positions], axis=-1)[:, :20]
        out |= {
            f"prompt_{i}": np.array(start, dtype=np.int32),
            f"continuation_{i}": np.array(continuation, dtype=np.int32),
            f"margin_{i}": best_two[:, 1] - best_two[:, 0],
            f"positions_{i}": positions,
            f"top_ids_{i}": top.astype(np.int32),
            f"top_logits_{i}": np.take_along_axis(logits[positions], top, axis=-1),
        }
        print("smallest margin", out[f"margin_{i}"].min())
    np.savez_compressed(path, **out)


if __name__ == "__main__":
    make_tiny(HERE / "tiny.npz")
    make_smollm2(HERE / "smollm2.npz")
