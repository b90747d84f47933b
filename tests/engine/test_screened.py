"""Decoding with a screened head against its twin in NumPy, and what the kernels say that they read of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp

from decoding import decoded
from fewfire import quantize
from fewfire.engine import Engine
from fewfire.kernels.work import HEAD_CHUNKS
from fewfire.model import Model
from fewfire.observe import head_rows
from fewfire.pack import pack
from fewfire.packed import Packed, open_packed
from fewfire.selectors import Screen, Selection, codes
from fewfire.selectors.screen import reduced, screened
from tiny import prompt, write_tiny

PackedPath = Callable[[str, str], Path]
IDS = prompt(12)
ODD: dict[str, Any] = {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "vocab_size": 311}


@pytest.fixture
def odd_path(shaped_path: Callable[..., Path]) -> Callable[[str], Path]:
    """A model none of whose sizes is a multiple of anything, packed in a format."""
    return partial(shaped_path, **ODD)


def random_screen(random: np.random.Generator, packed: Packed, rank: int, margin: float) -> Screen:
    """As a fit might leave it, but without any likeness to the head."""
    c, table = packed.config, packed.formats.table
    rows = random.standard_normal((c.vocab_size, rank), np.float32) * codes.spread(rank) / np.float32(rank**0.5)
    basis = random.standard_normal((rank, c.hidden_size), np.float32) * np.float32(2 / c.hidden_size**0.5)
    basis /= codes.spread(rank)[:, None]
    centre = random.standard_normal((1, c.hidden_size), np.float32)
    return Screen(
        *codes.encode(rows),
        quantize.encode(basis, table, "dot").view(np.uint8),
        quantize.encode(centre, table, "dot").view(np.uint8),
        rank,
        random.standard_normal(c.vocab_size).astype(np.float32),
        margin,
    )


def twin(packed: Packed, screen: Screen, dense: np.ndarray) -> np.ndarray:
    """The screened logits `(T, vocab)` of the final hidden states that dense logits tell of."""
    states = np.linalg.lstsq(head_rows(packed).astype(np.float64), dense.T.astype(np.float64))[0].T
    return screened(screen, *reduced(packed, screen, states.astype(np.float32)))


def size(screen: Screen) -> int:
    """Bytes of all that a token reads of a screen."""
    return sum(each.nbytes for each in (screen.codes, screen.scales, screen.basis, screen.centre, screen.bias))


def exact(engine: Engine) -> int:
    """Rows of the head that the last token read."""
    return int(engine._work.exact.sum())


def check_against_twin(packed: Packed, screen: Screen) -> None:
    tolerance = 0.05  # an integer may be rounded the other way
    model, vocab = Model(packed, 2), packed.config.vocab_size
    ids = [token % vocab for token in IDS]
    dense = decoded(model, ids)
    model.engine.select(Selection("screen", screen=screen))
    ours, theirs = decoded(model, ids), twin(packed, screen, dense)
    under = logsumexp(theirs, axis=1, keepdims=True) - theirs
    surely, never = under < screen.margin - 2 * tolerance, under > screen.margin + 2 * tolerance
    few = 2 * len(ids) if vocab > HEAD_CHUNKS else 0
    assert surely.sum() > few
    assert never.sum() > few
    np.testing.assert_array_equal(ours[surely], dense[surely])
    apart = np.abs(ours - theirs)[never]
    assert apart.max() < tolerance
    assert np.median(apart) < {"f32": 1e-4, "q8": 1e-3, "q4": 0.01}[packed.weights]
    assert surely[-1].sum() <= exact(model.engine) <= (~never)[-1].sum()
    for threads in (1, 3):
        other = Model(packed, threads)
        other.engine.select(Selection("screen", screen=screen))
        np.testing.assert_array_equal(decoded(other, ids), ours)
        assert exact(other.engine) == exact(model.engine)


@pytest.mark.parametrize("weights", ["q4", "q8", "f32"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma3", "opt"])
def test_against_the_twin(family: str, weights: str, packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path(family, weights))
    check_against_twin(packed, random_screen(random, packed, int(random.choice([64, 192, 320])), 4.0))


@pytest.mark.parametrize("weights", ["q4", "q8", "f32"])
def test_odd_sizes(weights: str, odd_path: Callable[[str], Path], random: np.random.Generator) -> None:
    packed = open_packed(odd_path(weights))
    for rank in (64, 192):
        check_against_twin(packed, random_screen(random, packed, rank, 4.0))


@pytest.mark.parametrize("weights", ["q4", "q8", "f32"])
@pytest.mark.parametrize("vocab", [5, 13, HEAD_CHUNKS - 1])
def test_fewer_tokens_than_chunks(vocab: int, weights: str, tmp_path: Path, random: np.random.Generator) -> None:
    """Some chunks have no token. Logits tell of the hidden states only if there are as many of them."""
    shapes = {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": vocab}
    packed = open_packed(pack(write_tiny("llama", tmp_path / "model", **shapes), tmp_path / "packed", weights))
    check_against_twin(packed, random_screen(random, packed, 64, float(np.log(vocab))))


@pytest.mark.parametrize("weights", ["q4", "f32"])
def test_everything_exact_is_dense(weights: str, packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path("llama", weights))
    model, screen = Model(packed, 2), random_screen(random, packed, 192, 1e9)
    dense, every = decoded(model, IDS), model.engine.bytes_read()
    model.engine.select(Selection("screen", screen=screen))
    np.testing.assert_array_equal(decoded(model, IDS), dense)
    assert exact(model.engine) == packed.config.vocab_size
    assert model.engine.bytes_read() == every + size(screen)
    model.engine.select(Selection("screen", screen=replace(screen, margin=np.inf)))
    np.testing.assert_array_equal(decoded(model, IDS), dense)
    assert model.engine.bytes_read() == every


def test_more_candidates_than_are_computed_together(tmp_path: Path, random: np.random.Generator) -> None:
    packed = open_packed(pack(write_tiny("llama", tmp_path / "model", vocab_size=18001), tmp_path / "packed", "q4"))
    model = Model(packed, 1)
    dense = decoded(model, IDS[:3])
    screen = random_screen(random, packed, 192, 1e9)
    model.engine.select(Selection("screen", screen=screen))
    np.testing.assert_array_equal(decoded(model, IDS[:3]), dense)
    screened = twin(packed, screen, dense)[-1]
    margin = float(logsumexp(screened) - np.quantile(screened, 0.3))
    model.engine.select(Selection("screen", screen=replace(screen, margin=margin)))
    found, count = decoded(model, IDS[:3]), exact(model.engine)
    assert HEAD_CHUNKS * 256 < count < 18001
    assert count <= (found[-1] == dense[-1]).sum() < count + 20  # a few by chance


@pytest.mark.parametrize("weights", ["q4", "q8"])
def test_bytes_are_those_that_are_read(weights: str, packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path("llama", weights))
    model, screen = Model(packed, 2), random_screen(random, packed, 64, 3.0)
    decoded(model, IDS)
    every, head = model.engine.bytes_read(), packed.arrays["head"].nbytes
    model.engine.select(Selection("screen", screen=screen))
    assert model.engine.bytes_read() == every  # before the first token
    decoded(model, IDS)
    row = quantize.row_bytes(packed.formats.table, packed.config.hidden_size)
    reads = size(screen) + exact(model.engine) * row
    assert 0 < exact(model.engine) < packed.config.vocab_size
    assert every - model.engine.bytes_read() == head - reads
    model.engine.select(None)
    decoded(model, IDS)
    assert model.engine.bytes_read() == every


def test_threads_change_nothing(packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path("llama", "q4"))
    screen, found = random_screen(random, packed, 192, 3.5), []
    for threads in (1, 2, 5):
        model = Model(packed, threads)
        model.engine.select(Selection("screen", screen=screen))
        found.append((decoded(model, IDS), model.engine._work.exact.tolist()))
    for logits, read in found[1:]:
        np.testing.assert_array_equal(logits, found[0][0])
        assert read == found[0][1]


@pytest.mark.parametrize(("margin", "share"), [(5.6, 0), (5.9, 1)])
def test_where_nothing_stands_out(
    margin: float, share: int, odd_path: Callable[[str], Path], random: np.random.Generator
) -> None:
    """All 311 tokens have a probability of exp(-5.74): the largest is no exception."""
    packed = open_packed(odd_path("q4"))
    model, screen = Model(packed, 2), random_screen(random, packed, 64, margin)
    model.engine.select(
        Selection(
            "screen",
            screen=replace(screen, scales=0 * screen.scales, centre=0 * screen.centre, bias=0 * screen.bias + 3),
        )
    )
    logits = decoded(model, IDS)
    assert exact(model.engine) == share * packed.config.vocab_size
    assert (logits == 3).all() == (share == 0)


def test_screens_are_swapped(packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path("gemma3", "q4"))
    model = Model(packed, 2)
    dense = decoded(model, IDS)
    screens = [random_screen(random, packed, rank, 3.5) for rank in (64, 320, 192)]
    first = []
    for screen in screens:
        fresh = Model(packed, 2)
        fresh.engine.select(Selection("screen", screen=screen))
        first.append(decoded(fresh, IDS))
    for i in (0, 1, 2, 1, 0):
        model.engine.select(Selection("screen", screen=screens[i]))
        np.testing.assert_array_equal(decoded(model, IDS), first[i])
        model.engine.select(None)
        np.testing.assert_array_equal(decoded(model, IDS), dense)


def test_nothing_is_left_over_from_before(packed_path: PackedPath, random: np.random.Generator) -> None:
    """Scratch of the head begins as rubbish, and logits lie between zones that nobody may write to."""
    packed = open_packed(packed_path("llama", "q4"))
    model, vocab = Model(packed, 2), packed.config.vocab_size
    model.engine.select(Selection("screen", screen=random_screen(random, packed, 192, 3.5)))
    expected, cache, work = decoded(model, IDS), model.engine.new_cache(len(IDS)), model.engine._work
    rubbish = {"largest": np.nan, "totals": np.nan, "least": np.nan, "values": np.nan, "candidates": -1, "exact": 2**40}
    for position, token in enumerate(IDS):
        for name, value in rubbish.items():
            for array in work._owned:
                if isinstance(array, np.ndarray) and array.ctypes.data == work.record[name][0]:
                    array.fill(value)
        out = np.full(vocab + 128, np.nan, np.float32)
        model.engine.decode(token, position, cache, out[64:-64])
        assert model.engine._work is work
        np.testing.assert_array_equal(out[64:-64], expected[position])
        assert np.isnan(out[:64]).all()
        assert np.isnan(out[-64:]).all()
        assert 0 < exact(model.engine) <= vocab


def test_nan_is_not_hidden(packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path("llama", "f32"))
    model = Model(packed, 2)
    model.engine.select(Selection("screen", screen=random_screen(random, packed, 192, 3.5)))
    model.engine._model.point("final_norm", np.full(packed.config.hidden_size, np.nan, np.float32))
    assert np.isnan(decoded(model, IDS[:1])).all()


def test_a_screen_of_another_shape_is_refused(packed_path: PackedPath, random: np.random.Generator) -> None:
    packed = open_packed(packed_path("llama", "q4"))
    model, screen = Model(packed, 1), random_screen(random, packed, 192, 3.5)
    before = decoded(model, IDS)
    for wrong in (
        replace(screen, codes=screen.codes[:-1]),
        replace(screen, scales=screen.scales[:-1]),
        replace(screen, centre=screen.centre[:, :-1]),
        replace(screen, basis=screen.basis[:, :-1]),
        replace(screen, bias=screen.bias.astype(np.float64)),
        replace(screen, scales=screen.scales * np.float32(np.inf)),
        replace(screen, bias=np.where(screen.bias > 0, np.float32(np.inf), screen.bias)),
        replace(screen, rank=200),
        replace(screen, rank=320),
        replace(screen, margin=float("nan")),
    ):
        with pytest.raises(ValueError, match="the selection does not fit the model"):
            model.engine.select(Selection("screen", screen=wrong))
    np.testing.assert_array_equal(decoded(model, IDS), before)
