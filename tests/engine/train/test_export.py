"""What training leaves computes what the trained network does: read again, packed, and as an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewfire
import tiny
import tiny_gguf
from fewfire.adapter import Adapted, open_adapter
from fewfire.checkpoint import Checkpoint, open_checkpoint
from fewfire.config import ModelConfig
from fewfire.errors import CheckpointError
from fewfire.pack import pack
from fewfire.train import export, lora
from fewfire.train.hfconfig import hf_config
from fewfire.train.method import Method, Result
from fewfire.train.network import Network
from fewfire.train.relufy import Relufy, shift
from fewfire.train.rise import Rise
from fewfire.train.topk import TopKMethod

IDS = tiny.prompt(40)
WINDOWS = np.random.default_rng(0).integers(3, 300, (8, 32)).astype(np.int32)
CLOSE = 2e-3  # logits of the same weights, computed in another order


def relufied(network: Network, kind: Any = "threshold", **more: Any) -> Method:
    if kind == "shifted":
        shift(network, 0.3)
    rise = Rise(0.6, 1, start=0.6) if kind in ("threshold", "centred") else None
    return Relufy(network, WINDOWS, rise, 1, kind=kind, **more)


METHODS: dict[str, Callable[[Network], Method]] = {
    "threshold": relufied,
    "centred": lambda network: relufied(network, "centred"),
    "relu": lambda network: relufied(network, "relu"),
    "stage 2": lambda network: relufied(network, "relu", stage=2),
    "centred stage 2": lambda network: relufied(network, "centred", stage=2),
    "shifted": lambda network: relufied(network, "shifted"),
    "topk": lambda network: TopKMethod(network, Rise(0.7, 1, start=0.7)),
}


def trained(checkpoint: Checkpoint, method: str, rank: int) -> tuple[Network, Result]:
    """A network whose weights have moved at random, as far as training might move them."""
    network = Network.from_checkpoint(checkpoint)
    result = METHODS[method](network).result()
    lora.choose(network, rank, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in lora.trainable(network):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.03
    return network.eval(), result


def round_(network: Network) -> None:
    """Rounds the matrices as they are stored."""
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            if value.ndim > 1:
                value.copy_(value.half().float())


def logits(network: Network, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return network(torch.tensor([ids]))[0].numpy()


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_the_engine_computes_what_the_network_does(
    method: str, rank: int, checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    network, result = trained(checkpoint("llama"), method, rank)
    before = logits(network, IDS)
    export.write(network, checkpoint("llama"), result, tmp_path / "out")
    assert np.abs(logits(network, IDS) - before).max() < CLOSE  # low-rank updates have been merged
    round_(network)
    wanted = logits(network, IDS)
    model = fewfire.load(pack(tmp_path / "out", tmp_path / "packed", "f32"), threads=1)
    at_once = model.logits(IDS)
    assert np.abs(at_once - wanted).max() < CLOSE
    session = model.session()
    one_by_one = np.concatenate([session.feed([token], all_logits=True) for token in IDS])
    assert np.abs(one_by_one - wanted).max() < CLOSE
    original = logits(Network.from_checkpoint(checkpoint("llama")), IDS)
    assert np.abs(original - wanted).max() > 0.2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_read_back(family: str, checkpoint: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    opened = checkpoint(family)
    network = Network.from_checkpoint(opened).requires_grad_(False)
    export.write(network, opened, Result(), tmp_path)
    again = open_checkpoint(tmp_path)
    assert again.config == opened.config
    assert again.tokenizer_json() == opened.tokenizer_json()
    assert again.chat_template() == opened.chat_template()
    for name in opened.config.shapes():
        assert np.allclose(again.read(name), opened.read(name), rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_where_no_config_can_be_written_an_adapter_is_all_there_is(tmp_path: Path) -> None:
    opened = open_checkpoint(tiny_gguf.write_tiny_gguf("llama-llama3", tmp_path / "model.gguf"))
    network, result = trained(opened, "threshold", 3)
    export.check(network, opened, result, with_adapter=True)
    with pytest.raises(CheckpointError, match="all that training can leave is an adapter"):
        export.check(network, opened, result, with_adapter=False)
    choosing = METHODS["topk"](Network.from_checkpoint(opened)).result()
    with pytest.raises(CheckpointError, match="use relufy or plain"):
        export.check(network, opened, choosing, with_adapter=True)
    path = tmp_path / export.ADAPTER
    export.write_adapter(network, opened, result, path, base="tiny", method="relufy", about={})
    with pytest.raises(CheckpointError, match="cannot describe this model"):
        export.write(network, opened, result, tmp_path)  # whose adapter that is, the caller knows
    export.write(network, opened, result, tmp_path, with_adapter=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.safetensors", "model.gguf"]


@pytest.mark.parametrize("method", METHODS)
def test_what_can_be_written_is_known_before(method: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    network = Network.from_checkpoint(checkpoint("llama"))
    export.check(network, checkpoint("llama"), METHODS[method](network).result(), with_adapter=False)


def down_moved(opened: Checkpoint, by: float) -> Network:
    """A network whose down matrices, biases and norms have moved, in steps that float16 has."""
    network = Network.from_checkpoint(opened)
    lora.add_biases(network)
    lora.choose(network, 3, 0, ("down",))
    with torch.no_grad():
        for _, parameter in lora.trainable(network):
            parameter += by * torch.randn(parameter.shape)
            parameter.copy_(parameter.half().float())
    return network.eval()


def opt_without_biases(directory: Path) -> tuple[Checkpoint, Network]:
    """An OPT that has none, and a network of it that has been trained with biases of the FFNs."""
    opened = open_checkpoint(tiny.write_tiny("opt", directory, enable_bias=False))
    assert not opened.config.ffn_bias
    return opened, down_moved(opened, 0.1)


def test_opt_has_one_switch_for_all_biases(tmp_path: Path) -> None:
    """Where only the FFNs have any, the others are zero."""
    opened, network = opt_without_biases(tmp_path / "base")
    export.write(network, opened, Result(), tmp_path / "out")
    round_(network)
    again = open_checkpoint(tmp_path / "out")
    assert again.config == replace(opened.config, qkv_bias=True, o_bias=True, ffn_bias=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["enable_bias"] is True
    assert not again.read("layers.1.q.bias").any()
    assert again.read("layers.1.gate.bias").any()
    wanted = logits(network, IDS)
    assert np.abs(logits(Network.from_checkpoint(again), IDS) - wanted).max() < CLOSE
    model = fewfire.load(pack(tmp_path / "out", tmp_path / "packed", "f32"), threads=1)
    assert np.abs(model.logits(IDS) - wanted).max() < CLOSE


def test_transformers_reads_an_opt_that_has_got_biases(tmp_path: Path, peers: Any) -> None:
    opened, network = opt_without_biases(tmp_path / "base")
    export.write(network, opened, Result(), tmp_path / "out")
    round_(network)
    theirs = peers.logits(peers.from_directory(tmp_path / "out").float(), IDS)
    assert np.abs(theirs - logits(network, IDS)).max() < CLOSE


def test_an_adapter_of_an_opt_has_the_biases_that_moved(tmp_path: Path) -> None:
    opened, network = opt_without_biases(tmp_path / "base")
    wanted, path = logits(network, IDS), tmp_path / "adapter.safetensors"
    export.write_adapter(network, opened, Result(), path, base="tiny", method="plain", about={})
    adapted = Adapted(opened, open_adapter(path))
    assert adapted.config == replace(opened.config, ffn_bias=True)
    assert np.abs(logits(Network.from_checkpoint(adapted), IDS) - wanted).max() < CLOSE
    assert fewfire.load(pack(tmp_path / "base", tmp_path / "packed", "f32", adapter=path), threads=1).config.ffn_bias


def test_transformers_reads_a_relu_model(checkpoint: Callable[[str], Checkpoint], tmp_path: Path, peers: Any) -> None:
    network, result = trained(checkpoint("llama"), "shifted", 3)
    export.write(network, checkpoint("llama"), result, tmp_path)
    round_(network)
    theirs = peers.logits(peers.from_directory(tmp_path).float(), IDS)
    assert np.abs(theirs - logits(network, IDS)).max() < CLOSE


@pytest.mark.parametrize("family", sorted(tiny_gguf.ARCHITECTURES))
def test_a_config_is_written_for_what_came_as_gguf(family: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_gguf.write_tiny_gguf(family, path)
    opened = open_checkpoint(path)
    if family == "llama-llama3":  # its scaling comes as a list of factors
        with pytest.raises(CheckpointError, match="cannot describe this model"):
            hf_config(opened, opened.config)
        return
    network = Network.from_checkpoint(opened)
    export.write(network, opened, Result(), tmp_path / "out")
    again = open_checkpoint(tmp_path / "out")
    assert again.config == opened.config
    round_(network)
    assert np.abs(logits(Network.from_checkpoint(again), IDS) - logits(network, IDS)).max() < CLOSE


@pytest.mark.parametrize("method", [name for name in METHODS if name != "topk"])
@pytest.mark.parametrize("rank", [3, 0])
def test_an_adapter_has_the_update(
    method: str, rank: int, checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """Low-rank updates as they are; full ones in few bits, near to what they were."""
    opened, path = checkpoint("llama"), tmp_path / "adapter.safetensors"
    network, result = trained(opened, method, rank)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith((".A", ".B")):
                parameter.copy_(parameter.half().float())
    wanted, original = logits(network, IDS), logits(Network.from_checkpoint(opened), IDS)
    about = {"tokens": 10}
    export.write_adapter(network, opened, result, path, base="tiny", method="relufy", about=about)
    adapter = open_adapter(path)
    adapted = Adapted(opened, adapter)
    assert (adapter.base, adapter.method, adapter.about) == ("tiny", "relufy", about)
    errors = np.abs(logits(Network.from_checkpoint(adapted), IDS) - wanted)
    assert errors.max() < CLOSE if rank else errors.mean() < 0.35 * np.abs(wanted - original).mean()
    export.write(network, opened, result, tmp_path / "out")
    assert adapted.config == open_checkpoint(tmp_path / "out").config


def test_what_has_not_moved_is_not_in_an_adapter(checkpoint: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """Rows of gate and up are then quantised as the original's are, bit for bit."""
    opened, path = checkpoint("llama"), tmp_path / "adapter.safetensors"
    network = down_moved(opened, 0.01)
    wanted = logits(network, IDS)
    export.write_adapter(network, opened, Result(), path, base="tiny", method="plain", about={})
    adapted = Adapted(opened, open_adapter(path))
    names = {name.split(".", 2)[2] for name in open_adapter(path).entries}
    norms = {"attn_norm.weight", "ffn_norm.weight"}
    assert names == {"down.A", "down.B", "gate.bias", "up.bias", "down.bias"} | norms
    assert np.abs(logits(Network.from_checkpoint(adapted), IDS) - wanted).max() < CLOSE
    for part in ("gate", "up"):
        name = f"layers.1.{part}.weight"
        assert np.array_equal(adapted.read(name), opened.read(name))
    export.write(network, opened, Result(), tmp_path / "out")
    assert adapted.config == open_checkpoint(tmp_path / "out").config


def test_no_adapter_for_a_selection(checkpoint: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    network, result = trained(checkpoint("llama"), "topk", 3)
    with pytest.raises(ValueError, match="an adapter cannot hold"):
        export.write_adapter(network, checkpoint("llama"), result, tmp_path / "a", base="tiny", method="topk", about={})


def test_config_is_last(
    checkpoint: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory without config.json is no model, so an export that fails leaves none."""
    network, result = trained(checkpoint("llama"), "threshold", 0)

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    opened = checkpoint("llama")
    monkeypatch.setattr(opened, "tokenizer_json", full)
    with pytest.raises(Exception, match=r"cannot write the trained model to .*No space"):
        export.write(network, opened, result, tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob(".writing*"))


def test_what_changes_in_config_json(checkpoint: Callable[[str], Checkpoint]) -> None:
    opened = checkpoint("sparsellama")
    config = ModelConfig.from_dict({**opened.config.to_dict(), "hidden_act": "relu", "norm_relu": True})
    data = hf_config(opened, config)
    assert (data["hidden_act"], data["norm_relu"]) == ("relu", True)
    before = json.loads((opened.path / "config.json").read_text())
    changed = {name for name in before if data.get(name) != before[name]}
    assert changed == {"hidden_act", "torch_dtype"}
    assert data["torch_dtype"] == "float16"
