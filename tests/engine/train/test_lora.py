"""Low-rank updates: nothing at first, the same when merged, and the nearest of their rank when cut from a full one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fewfire.train import lora
from fewfire.train.network import Network

IDS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def test_nothing_changes_at_first_and_merging_changes_nothing(network: Callable[[str], Network]) -> None:
    net = network("llama-bias")
    with torch.no_grad():
        before = net(IDS)
        lora.choose(net, 4, seed=1)
        assert torch.equal(net(IDS), before)
        for name, parameter in lora.trainable(net):
            if name.endswith(".B"):
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1
        moved = net(IDS)
        assert (moved - before).abs().max() > 0.1
        lora.merge(net)
        assert (net(IDS) - moved).abs().max() < 1e-4
    assert set(net.state_dict()) == set(network("llama-bias").state_dict())


@pytest.mark.parametrize("rank", [0, 3])
def test_what_moves(network: Callable[[str], Network], rank: int) -> None:
    net = network("llama-bias")
    lora.choose(net, rank, 0, ("gate", "down"))
    weights = ("A", "B") if rank else ("weight",)
    per_layer = {f"{part}.{w}" for part in ("gate", "down") for w in (*weights, "bias")}
    per_layer |= {"up.bias", "attn_norm.weight", "ffn_norm.weight"}
    found = {name for name, _ in lora.trainable(net)}
    assert found == {f"layers.{i}.{name}" for i in range(net.config.num_hidden_layers) for name in per_layer}


def test_the_same_seed_gives_the_same_start(network: Callable[[str], Network]) -> None:
    starts = []
    for seed in (5, 5, 6):
        net = network("llama")
        lora.choose(net, 2, seed)
        starts.append(net.layers[1].up.A)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("rank", [-1, 64])
def test_impossible_ranks(network: Callable[[str], Network], rank: int) -> None:
    with pytest.raises(ValueError, match="rank must be"):
        lora.choose(network("llama"), rank, 0)


def test_biases_that_are_added_change_nothing_yet(network: Callable[[str], Network]) -> None:
    net = network("llama")
    with torch.no_grad():
        before = net(IDS)
        lora.add_biases(net)
        assert torch.equal(net(IDS), before)
        assert net.config.ffn_bias
        for layer in net.layers:
            assert {layer.gate.bias.shape, layer.up.bias.shape} == {(net.config.intermediate_size,)}
            layer.gate.bias += 1
        assert (net(IDS) - before).abs().max() > 0.1
