"""The compiled engine against transformers, against the oracle in every format, and against itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import oracle
from fewfire import engine, packed
from fewfire.checkpoint import open_checkpoint
from fewfire.config import EXACT_ZEROS, THRESHOLDED
from fewfire.engine import BATCH
from fewfire.kernels import neurons, select
from fewfire.kernels.attention import RANGE
from fewfire.kernels.compile import Compiled
from fewfire.model import Model
from fewfire.pack import pack
from fewfire.packed import open_packed
from fewfire.quantize import FORMATS
from fewfire.selectors import Selection
from tiny import FAMILIES, prompt, write_safetensors, write_tiny

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE = 2e-4  # ten times under what is promised; float32 in another order gives 5e-5
ODD: dict[str, Any] = {  # no multiple of anything, one key head for all, a vocabulary larger than the tokenizer's
    "hidden_size": 40,
    "intermediate_size": 50,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "vocab_size": 311,
}
PackedPath = Callable[[str, str], Path]


def model_of(path: Path, threads: int = 2) -> Model:
    return Model(open_packed(path), threads)


def logits(model: Model, ids: Sequence[int], *sizes: int) -> np.ndarray:
    """Logits after each id, in pieces of these sizes and one by one after them."""
    session, parts, at = model.session(), [], 0
    for size in (*sizes, *[1] * (len(ids) - sum(sizes))):
        parts.append(session.feed(ids[at : at + size], all_logits=True))
        at += size
    assert session.tokens == list(ids)
    return np.concatenate(parts)


def largest(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["decode", "prefill"])
def test_what_an_interrupted_call_reads_is_kept_for_late_workers(
    call: str, packed_path: PackedPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are still at it when another selection has taken the place of the one that they use."""
    model, calls = model_of(packed_path("llama", "q4"), 1), list[int]()
    ids = prompt(1 if call == "decode" else 9)
    expected = model.session().feed(ids)
    shape = model.config.num_hidden_layers, model.config.intermediate_size
    model.engine.select(Selection("gate", gate=np.zeros(shape, np.float32)))
    kernel = getattr(engine, call)

    def interrupted(*arguments: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            raise KeyboardInterrupt
        kernel(*arguments)

    interrupted.cached = True  # type: ignore[attr-defined]  # as the kernel that it stands in for
    monkeypatch.setattr(engine, call, interrupted)
    session = model.session()
    with pytest.raises(KeyboardInterrupt):
        session.feed(ids)
    owners = [weakref.ref(model.engine._model), weakref.ref(model.engine._layers)]
    model.engine.select(None)
    gc.collect()
    assert all(owner() is not None for owner in owners)
    np.testing.assert_array_equal(session.feed(ids), expected)  # finishes the first call, then makes its own
    gc.collect()
    assert len(calls) == 3
    assert all(owner() is None for owner in owners)


# --- neurons that are zero --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["f32", "q4"])
def test_neurons_that_are_zero_are_not_read(family: str, weights: str, packed_path: PackedPath) -> None:
    """Every selector's count is what the kernels read; a ReLU model loses nothing by it."""
    opened = open_packed(packed_path(family, weights))
    sparse, dense, ids = Model(opened, 2), Model(opened, 2, dense=True), prompt(24)
    ours, theirs = logits(sparse, ids), logits(dense, ids)
    read, every = sparse.engine.neurons_read()[:, 1:], opened.config.intermediate_size
    assert (dense.engine.neurons_read() == every).all()
    if opened.config.hidden_act in EXACT_ZEROS:
        assert (read < 0.8 * every).all()
        assert (read > 0).any()
        assert largest(ours, theirs) < (1e-5 if weights == "f32" else 0.05)
    else:
        assert (read == every).all()
        np.testing.assert_array_equal(ours, theirs)


# --- activations that are measured from a centre ----------------------------------------------------------------------


def uncut(source: Path) -> None:
    """No threshold cuts anything any more, and the bypass is what the centres give."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("act_centre.weight")]:
        at, centre = name.removesuffix("act_centre.weight"), tensors[name]
        tensors[at + "act_threshold.weight"] = np.full_like(centre, -1)
        tensors[at + "bypass.weight"] = (tensors[at + "down_proj.weight"] * centre) @ tensors[at + "up_proj.weight"]
    write_safetensors(file, tensors)


@pytest.mark.parametrize("weights", ["f32", "q8"])
@pytest.mark.parametrize("hidden", [12, 40, 64, 90, 200])
def test_a_bypass_puts_back_what_the_centres_give(hidden: int, weights: str, tmp_path: Path) -> None:
    """In rows that no chunk or strip begins or ends with; what is then left is a plain SiLU, of the same weights."""
    ids, models = prompt(33), list[Model]()
    for family in ("llama", "llama-centred"):
        source = write_tiny(family, tmp_path / family, hidden_size=hidden, head_dim=16)
        uncut(source)
        opened = open_packed(pack(source, tmp_path / f"packed-{family}", weights))
        models += [Model(opened, threads, dense=dense) for threads in (1, 2) for dense in (False, True)]
    plain, *others = (logits(model, ids, 21) for model in models)
    assert all(largest(other, plain) < (TOLERANCE if weights == "f32" else 0.05 * plain.std()) for other in others)


# --- f32 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_f32_matches_transformers(
    family: str, tiny_path: Callable[[str], Path], packed_path: PackedPath, peers: Any
) -> None:
    """A prompt of 64 tokens at once, then 16 one by one; and all one by one."""
    ids, model = prompt(80), model_of(packed_path(family, "f32"))
    theirs = peers.logits(peers.from_directory(tiny_path(family)), ids)
    ours = logits(model, ids, 64)
    print(f"{family}: {largest(ours, theirs):.1e}")
    assert 1 < ours.std() < 4
    assert largest(ours, theirs) < TOLERANCE
    assert largest(logits(model, ids), theirs) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_f32_matches_golden(family: str, packed_path: PackedPath) -> None:
    """Without torch: logits after the last token of the prompt, stored by golden/make.py."""
    with np.load(GOLDEN / "tiny.npz") as golden:
        ours = model_of(packed_path(family, "f32")).session().feed(prompt(64))
        assert largest(ours, golden[family]) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_f32_at_odd_sizes(family: str, tmp_path: Path) -> None:
    ids = prompt(33, vocab_size=311, seed=1)
    model = model_of(pack(write_tiny(family, tmp_path / "source", seed=1, **ODD), tmp_path / "packed", "f32"))
    assert largest(logits(model, ids, 21), oracle.logits(model.packed, ids)) < TOLERANCE


# --- all formats ------------------------------------------------------------------------------------------------------


# Shares of the logits' spread: root mean square and largest difference from the oracle that rounds as the engine does,
# root mean square of what rounding the activations changes at all.
LIMITS = {"q8": (0.001, 0.01, 0.02), "q4": (0.02, 0.25, 0.1)}


def check_format(model: Model, ids: Sequence[int]) -> None:
    """Against the oracle. Where float32 noise pushes an activation over the edge to the next integer, logits move by
    that integer's step; this happens a few times in 80 tokens.
    """
    ours, alike = logits(model, ids, 64), oracle.logits(model.packed, ids)
    if model.weights in ("f32", "bf16"):
        assert largest(ours, alike) < TOLERANCE
        return
    exact, (mean, most, rounding) = oracle.logits(model.packed, ids, rounding=False), LIMITS[model.weights]
    assert np.sqrt(np.mean((ours - alike) ** 2)) < mean * ours.std()
    assert largest(ours, alike) < most * ours.std()
    rounding *= 1.5 if model.config.hidden_act in THRESHOLDED else 1  # which jump at their thresholds
    assert np.sqrt(np.mean((ours - exact) ** 2)) < rounding * ours.std()


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_matches_the_oracle(family: str, weights: str, packed_path: PackedPath) -> None:
    check_format(model_of(packed_path(family, weights)), prompt(80))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "llama-centred"])
def test_q4_throughout(family: str, tiny_path: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> None:
    """With q4 down rows, as large models have them."""
    monkeypatch.setattr(packed, "_SMALL", 0)
    model = model_of(pack(tiny_path(family), tmp_path / "packed", "q4"))
    assert model.packed.formats.down == "q4"
    check_format(model, prompt(80))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "opt", "bamboo", "llama-centred"])
def test_formats_at_odd_sizes(family: str, weights: str, tmp_path: Path) -> None:
    source = write_tiny(family, tmp_path / "source", seed=2, **ODD)
    check_format(model_of(pack(source, tmp_path / "packed", weights)), prompt(80, vocab_size=311, seed=2))


# --- itself -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "llama-centred"])
def test_any_number_of_threads_gives_the_same_bits(family: str, weights: str, packed_path: PackedPath) -> None:
    ids = prompt(60)
    one, *others = (logits(model_of(packed_path(family, weights), threads), ids, 37) for threads in (1, 2, 3))
    for other in others:
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("window", [None, 5, RANGE + 1])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_attention_over_several_ranges(group: int, window: int | None, tmp_path: Path) -> None:
    """Prefill in pieces that begin and end anywhere, then decode, on any number of threads."""
    shapes = {"hidden_size": 32, "num_attention_heads": 2 * group, "num_key_value_heads": 2, "head_dim": 8}
    shapes |= {
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 600,
        "sliding_window": window,
    }
    ids = prompt(3 * RANGE + 2, seed=group)
    source = write_tiny("mistral", tmp_path / "source", **shapes)
    for weights in ("f32", "q4"):  # a float32 cache, a float16 one
        path = pack(source, tmp_path / weights, weights)
        model, *others = (model_of(path, threads) for threads in (1, 2, 3))
        found = logits(model, ids, RANGE - 2, 5, 2 * RANGE - 20)
        for other in others:
            np.testing.assert_array_equal(logits(other, ids, RANGE - 2, 5, 2 * RANGE - 20), found)
        if weights == "f32":
            assert largest(found, oracle.logits(model.packed, ids)) < TOLERANCE


@pytest.mark.parametrize("weights", ["f32", "q4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_pieces(family: str, weights: str, packed_path: PackedPath) -> None:
    ids, model = prompt(70), model_of(packed_path(family, weights))
    at_once = logits(model, ids, 70)
    for sizes in ((1, 69), (2, 3, 5, 60), (66, 4), (33, 37)):
        in_pieces = logits(model, ids, *sizes)
        if weights == "f32":
            assert largest(in_pieces, at_once) < TOLERANCE
        else:
            assert np.sqrt(np.mean((in_pieces - at_once) ** 2)) < 0.03 * at_once.std()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, BATCH - 1, BATCH, BATCH + 1, BATCH + 2, 2 * BATCH + 3])
def test_prompts_of_any_length(length: int, tmp_path: Path) -> None:
    """Around the padding to four tokens and the batches that a prompt is cut into; only the last logits, too."""
    source = write_tiny("llama", tmp_path / "source", max_position_embeddings=600, num_hidden_layers=1)
    model, ids = model_of(pack(source, tmp_path / "packed", "f32")), prompt(length)
    theirs = oracle.logits(model.packed, ids)
    assert largest(logits(model, ids, length), theirs) < TOLERANCE
    assert largest(model.session().feed(ids), theirs[-1]) < TOLERANCE


def test_a_shorter_prompt_after_a_longer_one(packed_path: PackedPath) -> None:
    """Buffers are reused; what an earlier prompt left there must not matter."""
    model = model_of(packed_path("gemma3", "f32"))
    fresh = [logits(model_of(packed_path("gemma3", "f32")), prompt(n, seed=n), n) for n in (3, 64, 62, 5)]
    for n, expected in zip((3, 64, 62, 5), fresh, strict=True):
        np.testing.assert_array_equal(logits(model, prompt(n, seed=n), n), expected)


@pytest.mark.parametrize("cached", [True, False])
def test_says_when_it_compiles(cached: bool, packed_path: PackedPath, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Compiled, "cached", property(lambda _: cached))
    Model(open_packed(packed_path("llama", "q4")), 1, progress=lambda *call: calls.append(call))
    if cached:
        assert calls == []
    else:
        assert {stage for stage, _, _ in calls} == {"compiling kernels for this CPU (only once)"}
        assert [done for _, done, _ in calls] == list(range(calls[0][2]))


def test_says_when_a_selection_is_the_first_to_need_a_step(
    packed_path: PackedPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, int]] = []
    model = Model(open_packed(packed_path("llama", "q4")), 1, dense=True)
    new = {step.__name__ for step in (select.keep, neurons.scatter_kept)}
    monkeypatch.setattr(Compiled, "cached", property(lambda step: step.__name__ not in new))
    shape = model.config.num_hidden_layers, model.config.intermediate_size
    down = Selection("down", down=np.full(shape, 0.1, np.float32))
    model.engine.select(down, progress=lambda *call: calls.append(call))
    assert calls == [("compiling kernels for this CPU (only once)", done, 2) for done in (0, 1)]
    model.engine.select(None, dense=True, progress=lambda *call: calls.append(call))
    assert len(calls) == 2


# --- the real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_of(pack(smollm2_path, tmp_path_factory.mktemp("smollm2") / "f32", "f32"))


def test_real_model_matches_golden(smollm2: Model) -> None:
    """The likeliest next token, 64 times, on five prompts; and the best logits at some positions."""
    worst = 0.0
    with np.load(GOLDEN / "smollm2.npz") as golden:
        for i in range(int(golden["n"])):
            start, continuation = golden[f"prompt_{i}"].tolist(), golden[f"continuation_{i}"].tolist()
            session = smollm2.session()
            rows, found = [session.feed(start, all_logits=True)], []
            while len(found) < len(continuation):
                found.append(int(rows[-1][-1].argmax()))
                rows.append(session.feed(found[-1:])[None])
            assert found == continuation
            top = np.take_along_axis(np.concatenate(rows)[golden[f"positions_{i}"]], golden[f"top_ids_{i}"], axis=-1)
            worst = max(worst, largest(top, golden[f"top_logits_{i}"]))
    print(f"smollm2: {worst:.1e}")
    assert worst < 2e-3


def test_real_model_matches_transformers(smollm2: Model, smollm2_path: Path, peers: Any) -> None:
    with np.load(GOLDEN / "smollm2.npz") as golden:
        ids = np.concatenate([golden["prompt_0"], golden["continuation_0"]]).tolist()[:64]
    theirs = peers.logits(peers.transformers_model(open_checkpoint(smollm2_path)), ids)
    ours = smollm2.logits(ids)
    print(f"smollm2: {largest(ours, theirs):.1e}")
    assert largest(ours, theirs) < 2e-3
