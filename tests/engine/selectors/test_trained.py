"""Models that were trained with a choice of their neurons: how it is described, and that prefill keeps to it, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from safetensors.numpy import save_file

from decoding import decoded
from fewfire import reference
from fewfire.calibrate import calibrate
from fewfire.checkpoint import open_checkpoint
from fewfire.config import ModelConfig
from fewfire.errors import CheckpointError
from fewfire.model import Model
from fewfire.pack import pack
from fewfire.packed import Packed, open_packed
from fewfire.selectors import store, trained
from fewfire.selectors.fitting import spread
from tiny import prompt, write_tiny
from unpack import tensors

IDS = prompt(40)
GROUPS, HIDDEN, NEURONS, LAYERS = 7, 64, 96, 3


def routers(random: np.random.Generator, dense: tuple[int, ...] = (1,)) -> dict[str, np.ndarray]:
    """Random routers that keep about half of the groups, but for the layers that are dense."""
    found: dict[str, np.ndarray] = {}
    for i in set(range(LAYERS)) - set(dense):
        at = f"layers.{i}.router."
        found[at + "weight"] = random.standard_normal((GROUPS, HIDDEN), np.float32)
        found[at + "bias"] = random.standard_normal(GROUPS).astype(np.float16)
        found[at + "members"] = random.permutation(NEURONS).astype(np.int32)
    return found


def describe(directory: Path, method: str, found: dict[str, np.ndarray] | None = None, **more: Any) -> Path:
    (directory / trained.NAME).write_text(json.dumps({"version": 1, "method": method, **more}))
    if found is not None:
        save_file(found, directory / trained.TENSORS)
    return directory


@pytest.fixture
def packed(tmp_path: Path, random: np.random.Generator) -> Callable[..., Packed]:
    """A tiny model that was trained with a method, packed."""

    def make(method: str, weights: str = "f32", family: str = "llama") -> Packed:
        source = write_tiny(family, tmp_path / method / family)
        if method == "topk":
            describe(source, "topk", k=[10, NEURONS, 25])
        else:
            describe(source, "router", routers(random))
        return open_packed(pack(source, tmp_path / method / f"{family}-{weights}", weights))

    return make


def twin(packed: Packed, ids: list[int]) -> np.ndarray:
    """The logits `(T, vocab)` of the forward pass in NumPy, with what is left out at zero."""
    neurons, selection = reference.neurons, store.load(packed)
    assert selection
    source = trained.read(Path(packed.path.parent / packed.name), packed.config)
    assert source

    def chosen(config: ModelConfig, weights: Any, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        gate, up = neurons(config, weights, layer, x)
        if source.top is not None:
            k = source.top[layer]
            kept = np.abs(gate) >= np.sort(np.abs(gate), axis=1)[:, -k, None]
            assert (kept.sum(axis=1) == k).all()
        else:
            assert source.weight is not None
            assert source.bias is not None
            assert source.members is not None
            scores = x @ source.weight[layer].T + source.bias[layer]
            kept = spread(scores > 0, source.members[layer])
        return np.where(kept, gate, 0), up

    with patch.object(reference, "neurons", chosen):
        return reference.forward(packed.config, tensors(packed), ids)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "llama-fatsilu", "llama-centred", "bamboo"])
@pytest.mark.parametrize("method", ["topk", "router"])
def test_prefill_and_decode_keep_to_it(method: str, family: str, packed: Callable[..., Packed]) -> None:
    found = packed(method, family=family)
    theirs = twin(found, IDS)
    for threads in (1, 2):
        model = Model(found, threads)
        assert np.abs(model.logits(IDS) - theirs).max() < 2e-4
        assert np.abs(decoded(model, IDS) - theirs).max() < 2e-4
    session, read = model.session(), []
    for token in IDS:
        session.feed([token])
        read.append(model.engine.neurons_read()[[0, 2], 2])
    assert (np.mean(read, axis=0) < NEURONS).all()  # for a single token a layer may need all
    assert np.abs(Model(found, 2, dense=True).logits(IDS) - theirs).max() > 0.05


@pytest.mark.parametrize("method", ["topk", "router"])
def test_in_integers(method: str, packed: Callable[..., Packed]) -> None:
    """A prompt in pieces of all sizes is what it is token by token, as far as rounding decides alike."""
    model = Model(packed(method, "q4"), 2)
    session = model.session()
    parts = [session.feed(IDS[a:b], all_logits=True) for a, b in ((0, 17), (17, 18), (18, 40))]
    ours, theirs = np.concatenate(parts), decoded(model, IDS)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.1 * theirs.std()
    model.engine.select(None)
    assert np.sqrt(np.mean((model.logits(IDS) - theirs) ** 2)) > 0.2 * theirs.std()


def test_exactly_k_are_read(packed: Callable[..., Packed]) -> None:
    model = Model(packed("topk"), 2)
    model.session().feed(IDS[:1])
    assert model.engine.neurons_read()[:, 2].tolist() == [10, NEURONS, 25]


def test_it_is_no_calibration(packed: Callable[..., Packed]) -> None:
    """Nothing was measured of it, and nothing may take its place."""
    found = packed("topk")
    assert store.is_trained(found)
    assert store.about(found) is None
    with pytest.raises(ValueError, match="was trained with a choice of its neurons") as caught:
        calibrate(Model(found, 1, dense=True), method="gate", density=0.5)
    assert "\n" not in str(caught.value)
    (found.path / store.NAME).write_text((found.path / store.NAME).read_text().replace('"topk"', '"top"'))
    with pytest.raises(CheckpointError, match=r"trained with cannot be used: .*; pack it again"):
        Model(found, 1)


def test_a_model_without_one(tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source")
    assert trained.read(source, open_checkpoint(source).config) is None
    found = open_packed(pack(source, tmp_path / "packed"))
    assert not store.is_trained(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 2, "method": "topk", "k": [1, 1, 1]}, "version is 2, expected 1"),
        ({"version": 1, "method": "gate"}, "method is 'gate', expected topk or router"),
        ({"version": 1}, "method is missing"),
        ({"version": 1, "method": "topk"}, "k is missing, expected a list of 3 entries"),
        ({"version": 1, "method": "topk", "k": [1, 2]}, "k is a list of 2 entries, expected a list of 3"),
        ({"version": 1, "method": "topk", "k": [1, 0, 2]}, r"k\[1\] is 0, expected a whole number from 1 to 96"),
        ({"version": 1, "method": "topk", "k": [1, 97, 2]}, r"k\[1\] is 97, expected a whole number from 1 to 96"),
        ({"version": 1, "method": "router"}, "sparsity.safetensors is missing"),
    ],
)
def test_descriptions_that_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source")
    (source / trained.NAME).write_text(json.dumps(content))
    refused(source, message)


def refused(source: Path, message: str) -> None:
    """In one line, before anything is packed."""
    with pytest.raises(CheckpointError, match=message) as caught:
        pack(source, source.parent / "packed")
    assert "\n" not in str(caught.value)
    assert not (source.parent / "packed").exists()


def _broken(found: dict[str, np.ndarray], how: str) -> dict[str, np.ndarray]:
    at = "layers.2.router."
    match how:
        case "nan":
            found[at + "weight"][3, 5] = np.nan
        case "twice":
            found[at + "members"][0] = found[at + "members"][1]
        case "shape":
            found[at + "bias"] = found[at + "bias"][:-1]
        case "groups":
            found[at + "weight"] = found[at + "weight"][:-1]
        case "part":
            del found[at + "bias"]
        case "layer":
            found["layers.3.router.bias"] = found[at + "bias"]
        case "integers":
            found[at + "members"] = found[at + "members"].astype(np.int64)
        case "floats":
            found[at + "weight"] = found[at + "weight"].astype(np.float64)
        case "empty":
            found = {}
    return found


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "layers.2.router.weight has NaN"),
        ("twice", "layers.2.router.members does not list every neuron once"),
        ("shape", r"layers.2.router.bias has shape \(6,\), the config asks for \(7,\)"),
        ("groups", "as many groups"),
        ("part", "layers.2.router.bias is missing: the router is incomplete"),
        ("layer", "layers.3.router.bias is none of a model with 3 layers"),
        ("integers", "stored as I64, not as I32"),
        ("floats", "layers.2.router.weight is stored as F64"),
        ("empty", "as many groups"),
    ],
)
def test_routers_that_are_refused(how: str, message: str, tmp_path: Path, random: np.random.Generator) -> None:
    source = write_tiny("llama", tmp_path / "source")
    refused(describe(source, "router", _broken(routers(random), how)), message)


def test_a_truncated_router(tmp_path: Path, random: np.random.Generator) -> None:
    source = describe(write_tiny("llama", tmp_path / "source"), "router", routers(random))
    path = source / trained.TENSORS
    path.write_bytes(path.read_bytes()[:-10])
    refused(source, "truncated")
