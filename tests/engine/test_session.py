"""Conversations: rewinding, growing, ending, and many at once on one model."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import oracle
from fewfire.errors import ContextFullError
from fewfire.model import Model
from fewfire.pack import pack
from fewfire.packed import open_packed
from fewfire.selectors import Selection
from tiny import VOCAB_SIZE, prompt, write_tiny

PackedPath = Callable[[str, str], Path]


@pytest.fixture(scope="module", params=["gemma3-f32", "llama-q4"])
def model(request: pytest.FixtureRequest, packed_path: PackedPath) -> Model:
    return Model(open_packed(packed_path(*request.param.split("-"))), 2)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With room for 1100 tokens, windows in every second layer."""
    directory = tmp_path_factory.mktemp("long")
    shapes = {"max_position_embeddings": 1100, "num_hidden_layers": 2}
    source = write_tiny("gemma3", directory / "source", **shapes)
    return Model(open_packed(pack(source, directory / "packed", "f32")), 2)


def test_logits_and_tokens(model: Model) -> None:
    ids, session = prompt(20), model.session()
    assert session.tokens == []
    every = session.feed(ids[:10], all_logits=True)
    assert every.shape == (10, VOCAB_SIZE)
    assert every.dtype == np.float32
    one = session.feed(ids[10:11], all_logits=True)
    assert one.shape == (1, VOCAB_SIZE)
    last = session.feed(np.array(ids[11:]))
    assert last.shape == (VOCAB_SIZE,)
    assert session.tokens == ids
    assert all(type(i) is int for i in session.tokens)
    again = model.session()
    again.feed(ids[:10])
    assert again.feed(ids[10:11]).shape == (VOCAB_SIZE,)
    np.testing.assert_array_equal(again.feed(ids[11:]), last)


def test_logits_belong_to_the_caller(model: Model) -> None:
    """They are not a buffer that the next call writes to."""
    session = model.session()
    first = session.feed(prompt(9))
    kept = first.copy()
    session.feed([5])
    session.feed(prompt(9))
    np.testing.assert_array_equal(first, kept)


def test_all_logits_are_in_memory_once(tmp_path: Path) -> None:
    """Of a long prompt with a large vocabulary they are the largest thing there is."""
    shapes = {"vocab_size": 30_000, "num_hidden_layers": 1, "max_position_embeddings": 1100}
    model = Model(open_packed(pack(write_tiny("llama", tmp_path / "source", **shapes), tmp_path / "packed", "q8")), 2)
    ids = prompt(1027)  # four whole batches, and one that is padded
    model.session().feed(ids)
    tracemalloc.start()
    try:
        logits = model.session().feed(ids, all_logits=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert logits.shape == (1027, 30_000)
    assert peak < 1.1 * logits.nbytes


def test_rewind(model: Model) -> None:
    ids, session = prompt(30), model.session()
    first = session.feed(ids[:20])
    session.feed(ids[20:])
    session.rewind(12)
    assert session.tokens == ids[:12]
    other = session.feed([7, 8, 9], all_logits=True)
    session.rewind(12)
    session.feed(ids[12:20])
    session.rewind(0)
    np.testing.assert_array_equal(session.feed(ids[:20]), first)
    session.rewind(20)
    straight = model.session()
    straight.feed(ids[:12])
    # Not to the bit: the first twelve went through in a larger batch.
    np.testing.assert_allclose(straight.feed([7, 8, 9], all_logits=True), other, atol=0.03 * other.std())


@pytest.mark.parametrize("n", [-1, 6, 100])
def test_rewind_to_where_one_has_not_been(model: Model, n: int) -> None:
    session = model.session()
    session.feed(prompt(5))
    with pytest.raises(ValueError, match=f"cannot keep {n} of 5 tokens"):
        session.rewind(n)
    assert len(session.tokens) == 5


@pytest.mark.parametrize("ids", [[], [3, -1], [VOCAB_SIZE], [3, 2**40]])
def test_impossible_tokens(model: Model, ids: list[int]) -> None:
    session = model.session()
    session.feed([4, 5])
    with pytest.raises(ValueError, match=f"no tokens|from 0 to {VOCAB_SIZE - 1}"):
        session.feed(ids)
    assert session.tokens == [4, 5]


@pytest.mark.parametrize("ids", ["42", [1.5], [3, None]])
def test_what_is_no_token(model: Model, ids: Any) -> None:
    session = model.session()
    with pytest.raises(TypeError, match="integer"):
        session.feed(ids)
    assert session.feed([np.int32(4)]).shape == (VOCAB_SIZE,)


def test_caches_grow(long: Model) -> None:
    """Beyond the first capacity, by single tokens, by a long prompt, and again."""
    ids = prompt(1100, seed=3)
    expected, session = oracle.logits(long.packed, ids), long.session()
    at, worst = 0, 0.0
    for size in (250, *[1] * 20, 300, *[1] * 5, 525):
        found = session.feed(ids[at : at + size], all_logits=True)
        worst = max(worst, float(np.abs(found - expected[at : at + size]).max()))
        at += size
    assert at == len(session.tokens) == long.context == 1100
    assert worst < 2e-4
    # A cache that is new again, on buffers that have seen longer ones; then far beyond twice its capacity.
    again = long.session()
    np.testing.assert_allclose(again.feed(ids[:40]), expected[39], atol=2e-4)
    np.testing.assert_allclose(again.feed(ids[40:900], all_logits=True), expected[40:900], atol=2e-4)
    np.testing.assert_allclose(again.feed(ids[900:901]), expected[900], atol=2e-4)


@pytest.mark.parametrize("length", [1, 2, 256, 257])
@pytest.mark.parametrize("cached", ["nothing", "all", "some"])
def test_a_prompt_is_read_with_all_weights(long: Model, length: int, cached: str) -> None:
    """Also where one token is left over, by the batches or by what the session has."""
    ids, neurons = prompt(length), (long.config.num_hidden_layers, long.config.intermediate_size)
    expected, found = long.logits(ids)[-1], list[np.ndarray]()
    with long.engine.borrowed():
        long.engine.select(Selection("nothing", gate=np.full(neurons, np.inf, np.float32)))
        session = long.session()
        assert np.abs(session.feed([ids[0]]) - long.logits(ids[:1])[0]).max() > 0.1  # decoded, and then as a prompt
        session.rewind(0)
        if cached != "nothing":
            session.feed(ids if cached == "all" else ids[: length // 2] or ids, prompt=True)
        read = session.feed

        def feed(ids: list[int], **options: bool) -> np.ndarray:
            found.append(read(ids, **options))
            return found[-1]

        with patch.object(session, "feed", feed):
            long.stream(ids, max_tokens=1, session=session).read()
        every = long.logits(ids)
    assert len(found) == 1
    assert session.tokens == ids
    np.testing.assert_allclose(found[0], expected, atol=2e-4)
    np.testing.assert_allclose(every[-1], expected, atol=2e-4)


def test_the_context_ends(packed_path: PackedPath) -> None:
    model = Model(open_packed(packed_path("llama", "q8")), 1, context=10)
    assert model.context == 10
    session = model.session()
    with pytest.raises(ContextFullError, match=r"^11 tokens do not fit the context of 10; [^\n]*$"):
        session.feed(prompt(11))
    assert session.tokens == []
    session.feed(prompt(9))
    session.feed([5])
    with pytest.raises(ContextFullError):
        session.feed([5])
    assert len(session.tokens) == 10
    session.rewind(8)
    session.feed([6, 7])


def test_sessions_take_turns(model: Model) -> None:
    """Each gets what it gets alone."""

    def steps(seed: int) -> list[list[int]]:
        ids = prompt(40, seed=seed)
        return [ids[:seed], ids[seed : seed + 1], ids[seed + 1 : 30], *[[i] for i in ids[30:]]]

    plans = [steps(seed) for seed in (3, 8, 11)]
    alone = []
    for plan in plans:
        session = model.session()
        alone.append([session.feed(step) for step in plan])
    sessions = [model.session() for _ in plans]
    for n, step in enumerate(zip(*plans, strict=True)):
        for i, session in enumerate(sessions):
            np.testing.assert_array_equal(session.feed(step[i]), alone[i][n])


def test_sessions_in_threads(model: Model) -> None:
    """Several at once on one model, and a second model at the same time."""
    other = Model(model.packed, 2)

    def talk(model: Model, seed: int) -> np.ndarray:
        ids, session = prompt(60, seed=seed), model.session()
        return np.stack([session.feed(ids[:30]), *(session.feed([i]) for i in ids[30:])])

    alone, found = [talk(model, seed) for seed in range(6)], {}

    def run(seed: int) -> None:
        found[seed] = talk(other if seed % 3 == 0 else model, seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(6):
        np.testing.assert_array_equal(found[seed], alone[seed])
