"""The adapters that come with the package: small, for the models they name, and what they promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fewfire
from fewfire.adapter import DELTA, Adapted, open_adapter
from fewfire.checkpoint import open_checkpoint
from fewfire.config import EXACT_ZEROS
from fewfire.errors import SourceError
from fewfire.evaluate import perplexity
from fewfire.pack import pack
from fewfire.sources import ADAPTED, ALIASES

LARGEST = 10_000_000  # bytes
TEXT = """The lighthouse stood on a rock at the end of the harbour, and its keeper had lived there for thirty years.
Every evening he climbed the stairs, cleaned the lamp and lit it; every morning he wrote into a book which ships had
passed, what the weather was, and whether anything had happened. Mostly nothing had. When the company sent a letter to
say that a machine would do his work from the spring on, he read it twice, put it between the pages of the book, and
went up to clean the lamp."""


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_that_comes_with_the_package(name: str, fetched: Callable[[str], Path], tmp_path: Path) -> None:
    alias = ADAPTED[name]
    assert alias.base in ALIASES
    assert alias.path.stat().st_size <= LARGEST
    assert alias.path.with_suffix(".md").read_text(encoding="utf-8").startswith("---\n"), "its model card"
    try:
        path = fetched(alias.base)
    except SourceError as error:
        pytest.skip(f"{alias.base} cannot be fetched: {error}")
    base, opened = open_checkpoint(path), open_adapter(alias.path)
    merged = Adapted(base, opened)
    assert merged.config.hidden_act in EXACT_ZEROS
    changed = next(name.rpartition(".")[0] + ".weight" for name in opened.entries if name.endswith((".A", DELTA)))
    assert np.abs(merged.read(changed) - base.read(changed)).max() > 0
    model = fewfire.load(pack(path, tmp_path / "packed", "q4", name=name, adapter=alias.path), threads=1)
    session, read = model.session(), []
    for token in model.tokenizer.encode("The capital of France is Paris, a city of museums, bridges and long dinners."):
        session.feed([token])
        read.append(model.engine.neurons_read()[:, 1].mean() / model.config.intermediate_size)
    assert np.mean(read) < 0.4, "it fires less"
    original = perplexity(fewfire.load(pack(path, tmp_path / "original", "q4", name=alias.base), threads=1), TEXT)
    assert perplexity(model, TEXT, decode=True).ppl < 1.6 * original.ppl, "and is still a model"
