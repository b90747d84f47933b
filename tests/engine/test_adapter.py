"""Adapters: merged as they say, and refused where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fewfire
from fewfire import adapter, deltas, reference, sources
from fewfire.adapter import Adapted, digest, open_adapter
from fewfire.checkpoint import Checkpoint, open_checkpoint
from fewfire.errors import CheckpointError
from fewfire.pack import pack
from fewfire.packed import open_packed
from fewfire.sources import AdaptedModel
from tiny import prompt, write_tiny
from tiny_gguf import write_tiny_gguf
from unpack import tensors

FATSILU = {"hidden_act": "fatsilu"}
RANK, LAYERS, HIDDEN, NEURONS = 3, 3, 64, 96


def changes(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """A random update of some matrices, another norm, and thresholds."""
    random, found = np.random.default_rng(0), dict[str, np.ndarray]()
    for i in range(LAYERS):
        for name in ("gate", "down", "q"):
            rows, columns = checkpoint.config.shapes()[f"layers.{i}.{name}.weight"]
            found[f"layers.{i}.{name}.A"] = random.standard_normal((RANK, columns)).astype(np.float16)
            found[f"layers.{i}.{name}.B"] = (random.standard_normal((rows, RANK)) / 20).astype(np.float16)
        found[f"layers.{i}.act_threshold.weight"] = random.uniform(0, 0.3, NEURONS).astype(np.float32)
    found["layers.1.ffn_norm.weight"] = random.uniform(0.5, 2, HIDDEN).astype(np.float32)
    return found


def save(path: Path, checkpoint: Checkpoint, found: dict[str, np.ndarray], **options: Any) -> Path:
    settings: dict[str, Any] = {"base": "tiny", "method": "test", "config": FATSILU, "about": {"a": 1}}
    adapter.save(path, checkpoint, found, **settings | options)
    return path


@pytest.fixture
def base(tiny_path: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(tiny_path("llama"))


def test_what_it_says(base: Checkpoint, tmp_path: Path) -> None:
    opened = open_adapter(save(tmp_path / "a", base, changes(base)))
    assert (opened.base, opened.method, opened.about) == ("tiny", "test", {"a": 1})
    assert opened.config == {"hidden_act": "fatsilu"}
    assert opened.digest == digest(base)
    assert {opened.entries[f"layers.0.gate.{part}"].dtype for part in "AB"} == {"F16"}
    assert opened.entries["layers.0.act_threshold.weight"].dtype == "F32"


def test_every_tensor_is_merged(base: Checkpoint, tmp_path: Path) -> None:
    found = changes(base)
    merged = Adapted(base, open_adapter(save(tmp_path / "a", base, found)))
    assert merged.config.hidden_act == "fatsilu"
    for name in merged.config.shapes():
        part, values = name.removesuffix(".weight"), merged.read(name)
        if name in found:
            np.testing.assert_array_equal(values, found[name])
        elif f"{part}.A" in found:
            low, high = found[f"{part}.A"].astype(np.float32), found[f"{part}.B"].astype(np.float32)
            np.testing.assert_allclose(values, base.read(name) + high @ low, atol=1e-5)
            np.testing.assert_allclose(merged.read(name, 5, 9), values[5:9], atol=1e-6)
            assert np.abs(values - base.read(name)).max() > 0.01
        else:
            np.testing.assert_array_equal(values, base.read(name))


def test_a_delta_is_merged_line_by_line(base: Checkpoint, tmp_path: Path) -> None:
    """A neuron's weights are a row of gate and a column of down."""
    random, found = np.random.default_rng(1), dict[str, np.ndarray]()
    for name in ("gate", "down"):
        shape = base.config.shapes()[f"layers.1.{name}.weight"]
        found[f"layers.1.{name}.delta"] = (random.standard_normal(shape) / 10).astype(np.float32)
    found["layers.1.down.delta"][:, 7] = 0
    opened = open_adapter(save(tmp_path / "a", base, found, config={}))
    assert opened.entries["layers.1.gate.scale"].shape == opened.entries["layers.1.down.scale"].shape == (NEURONS,)
    merged = Adapted(base, opened)
    for name in ("gate", "down"):
        full = f"layers.1.{name}.weight"
        got, wanted = merged.read(full) - base.read(full), found[f"layers.1.{name}.delta"]
        assert 0 < np.square(got - wanted).mean() < 0.05 * np.square(wanted).mean()
        np.testing.assert_array_equal(merged.read(full, 5, 9), merged.read(full)[5:9])
    np.testing.assert_array_equal(merged.read("layers.1.down.weight")[:, 7], base.read("layers.1.down.weight")[:, 7])
    np.testing.assert_array_equal(merged.read("layers.0.down.weight"), base.read("layers.0.down.weight"))


def test_a_delta_that_is_no_number_is_not_written(base: Checkpoint, tmp_path: Path) -> None:
    delta = np.zeros(base.config.shapes()["layers.0.up.weight"], np.float32)
    delta[3, 4] = np.nan
    with pytest.raises(CheckpointError, match=r"layers\.0\.up\.delta"):
        save(tmp_path / "a", base, {"layers.0.up.delta": delta}, config={})
    assert not (tmp_path / "a").exists()


def test_deltas_that_do_not_fit(base: Checkpoint, tmp_path: Path) -> None:
    packed, steps = deltas.encode(np.random.default_rng(0).standard_normal((NEURONS, HIDDEN)).astype(np.float32))
    whole = {"layers.0.up.delta": packed, "layers.0.up.scale": steps}
    for change, words in (
        ({"layers.0.up.scale": None}, "layers.0.up has a delta without a scale"),
        ({"layers.0.up.scale": np.ones(3, np.float32)}, "layers.0.up.scale has shape (3,)"),
        ({"layers.0.up.scale": np.full(NEURONS, np.nan, np.float32)}, "NaN"),
        ({"layers.0.up.delta": packed[None]}, "layers.0.up.delta has shape"),
        ({"layers.0.up.delta": packed[:-9]}, "layers.0.up is damaged ("),
        ({"layers.0.up.delta": packed.astype(np.float32)}, "stored as F32, not as U8"),
        ({"layers.0.up.scale": np.zeros(NEURONS, np.uint8)}, "stored as U8"),
        ({"layers.0.ffn_norm.delta": np.zeros((HIDDEN, 1), np.uint8)}, "layers.0.ffn_norm is no matrix"),
    ):
        found = {name: value for name, value in (whole | change).items() if value is not None}
        refused(rewrite(tmp_path / "a", base, found, {"config": {}}), base, words)


def test_packed_with_it(base: Checkpoint, tmp_path: Path) -> None:
    """The packed model computes what the merged tensors do, in prefill and in decode."""
    path, ids = save(tmp_path / "a", base, changes(base)), prompt(30)
    packed = open_packed(pack(base.path, tmp_path / "packed", "f32", adapter=path))
    merged = Adapted(base, open_adapter(path))
    theirs = reference.forward(merged.config, {name: merged.read(name) for name in merged.config.shapes()}, ids)
    np.testing.assert_allclose(reference.forward(packed.config, tensors(packed), ids), theirs, atol=1e-5)
    model = fewfire.load(packed.path)
    assert np.abs(model.logits(ids) - theirs).max() < 2e-4
    session = model.session()
    assert np.abs([session.feed([i]) for i in ids] - theirs).max() < 2e-4
    assert (model.engine.neurons_read()[:, 2] < NEURONS).all()


def test_biases_and_relus(tmp_path: Path, base: Checkpoint) -> None:
    """What a shifted ReLU and the second stage of relufication need."""
    shapes = {"gate": NEURONS, "up": NEURONS, "down": HIDDEN}
    found = {f"layers.{i}.{k}.bias": np.full(n, -0.1, np.float32) for i in range(LAYERS) for k, n in shapes.items()}
    config = {"hidden_act": "relu", "norm_relu": True, "ffn_bias": True}
    merged = Adapted(base, open_adapter(save(tmp_path / "a", base, found, config=config)))
    assert (merged.config.hidden_act, merged.config.norm_relu, merged.config.ffn_bias) == ("relu", True, True)
    packed = open_packed(pack(base.path, tmp_path / "packed", "q4", adapter=tmp_path / "a"))
    np.testing.assert_array_equal(packed.arrays["gate_bias"], np.full((LAYERS, NEURONS), -0.1, np.float32))


def test_any_file_of_the_same_weights(base: Checkpoint, tmp_path: Path) -> None:
    """A GGUF file stores q and k in another order, and has the same digest."""
    gguf = open_checkpoint(write_tiny_gguf("llama", tmp_path / "model.gguf"))
    assert digest(gguf) == digest(base)
    other = open_checkpoint(write_tiny("llama", tmp_path / "other", seed=1))
    assert digest(other) != digest(base)


def test_an_alias_with_an_adapter(
    base: Checkpoint, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "tiny-sparse.safetensors", base, changes(base))
    alias = AdaptedModel("tiny-sparse", "a test", "smollm2", str(path))
    monkeypatch.setattr(sources, "ADAPTED", {alias.name: alias})
    monkeypatch.setattr(sources.wheels, "fetch", lambda model, progress: base.path)
    assert sources.adapter_of("tiny-sparse") == path
    assert sources.adapter_of("smollm2") is None
    model, plain = fewfire.load("tiny-sparse", weights="f32"), fewfire.load("smollm2", weights="f32")
    assert (model.config.hidden_act, plain.config.hidden_act) == ("fatsilu", "silu")
    assert model.packed.name == "tiny-sparse"
    assert model.path != plain.path
    save(path, base, changes(base) | {"layers.1.ffn_norm.weight": np.ones(HIDDEN, np.float32)})
    assert fewfire.load("tiny-sparse", weights="f32").path != model.path, "packed anew when the adapter changes"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-sparse").mkdir()
    assert sources.adapter_of("tiny-sparse") is None, "a path wins over an alias"


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(path: Path, base: Checkpoint, *words: str) -> None:
    """In one line, and nothing is packed."""
    out = path.parent / "out"
    with pytest.raises(CheckpointError) as caught:
        pack(base.path, out, "f32", adapter=path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not out.exists()


def rewrite(path: Path, base: Checkpoint, found: dict[str, np.ndarray], about: Any = None) -> Path:
    """As a file could be that `save` did not write."""
    said = {"version": 2, "base": "tiny", "digest": digest(base), "method": "test", "config": FATSILU}
    text = about if isinstance(about, str) else json.dumps(said | (about or {}))
    save_file(found, path, metadata={adapter.KEY: text})
    return path


def test_another_model(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a", base, changes(base))
    other = open_checkpoint(write_tiny("llama", tmp_path / "other", seed=1))
    refused(path, other, "made for tiny", str(other.path))


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ("{", ("damaged",)),
        ("[]", ("damaged",)),
        ({"version": 1}, ("version is 1, expected 2",)),
        ({"base": None}, ("base is missing",)),
        ({"config": {"hidden_size": 3}}, ("hidden_size cannot be changed",)),
        ({"config": {"hidden_act": "gelu"}}, ("an activation",)),
        ({"config": {"hidden_act": 3}}, ("hidden_act is 3",)),
        ({"config": {"hidden_act": "fatsilu", "norm_relu": 1}}, ("norm_relu is 1",)),
        ({"config": {"hidden_act": "fatsilu", "ffn_bias": True}}, ("layers.0.gate.bias is missing",)),
    ],
)
def test_what_it_says_of_itself(about: Any, words: tuple[str, ...], base: Checkpoint, tmp_path: Path) -> None:
    refused(rewrite(tmp_path / "a", base, changes(base), about), base, *words)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("layers.0.gate.A", None, ("layers.0.gate has one of the tensors A and B",)),
        ("layers.0.gate.A", (RANK, HIDDEN + 1), ("layers.0.gate.A has shape (3, 65), the model asks for (3, 64)",)),
        ("layers.0.gate.A", (RANK + 1, HIDDEN), ("layers.0.gate.B has shape (96, 3), the model asks for (96, 4)",)),
        ("layers.0.gate.A", (HIDDEN,), ("layers.0.gate.A has shape (64,)",)),
        ("layers.0.gate.A", (), ("layers.0.gate.A has shape ()",)),
        ("layers.1.ffn_norm.weight", (HIDDEN + 1,), ("ffn_norm.weight has shape (65,)",)),
        ("layers.2.act_threshold.weight", None, ("layers.2.act_threshold.weight is missing",)),
        ("layers.3.gate.A", (RANK, HIDDEN), ("layers.3.gate is no matrix of tiny",)),
        ("layers.0.ffn_norm.B", (HIDDEN, RANK), ("layers.0.ffn_norm is no matrix of tiny",)),
        ("layers.0.gate.weight", (NEURONS, HIDDEN), ("layers.0.gate.weight is none",)),
        ("something", (3,), ("something is none",)),
    ],
)
def test_tensors_that_do_not_fit(
    name: str, shape: tuple[int, ...] | None, words: tuple[str, ...], base: Checkpoint, tmp_path: Path
) -> None:
    found = changes(base)
    found.pop(name, None)
    if shape is not None:
        found[name] = np.ones(shape, np.float32)
    refused(rewrite(tmp_path / "a", base, found), base, *words)


@pytest.mark.parametrize("name", ["layers.0.gate.B", "layers.2.act_threshold.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(name: str, value: float, base: Checkpoint, tmp_path: Path) -> None:
    found = changes(base)
    found[name].reshape(-1)[7] = value
    refused(rewrite(tmp_path / "a", base, found), base, name, "NaN")
    with pytest.raises(CheckpointError, match="NaN"):
        save(tmp_path / "b", base, found)
    assert not (tmp_path / "b").exists()


def test_other_files(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a", base, changes(base))
    whole = path.read_bytes()
    for kept in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:kept])
        refused(path, base)
    refused(base.path / "model.safetensors", base, "no adapter")
    save_file({k: v.astype(np.float64) for k, v in changes(base).items()}, path, metadata={adapter.KEY: "{}"})
    refused(tmp_path / "nothing", base, "cannot be read")


def test_a_failed_write_leaves_what_was_there(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a", base, changes(base))
    before = load_file(path)
    with pytest.raises(CheckpointError):
        save(path, base, {"layers.0.gate.A": np.ones((RANK, HIDDEN), np.float32)}, config={})
    np.testing.assert_equal(load_file(path), before)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
