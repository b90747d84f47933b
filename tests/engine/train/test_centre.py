"""Centres are where neurons idle; with them and the bypass nothing changes until thresholds leave something out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from fewfire import reference
from fewfire.adapter import Adapted, open_adapter
from fewfire.checkpoint import Checkpoint, open_checkpoint
from fewfire.train import export, lora
from fewfire.train.centre import ROUNDS, fit_centres
from fewfire.train.measure import measure
from fewfire.train.network import Network
from fewfire.train.relufy import Relufy, usual
from fewfire.train.rise import Rise
from fewfire.train.thresholds import neuron_weights
from fewfire.train.topk import TopKMethod
from fewfire.train.trainer import Plan
from learning import Learned

IDS = tiny.prompt(40)


def relufied(network: Network, windows: np.ndarray, kind: str = "centred", sparsity: float = 0.7) -> Relufy:
    return Relufy(network, windows, Rise(sparsity, 10, sparsity), 10, kind=kind)  # type: ignore[arg-type]


def logits(network: Network) -> np.ndarray:
    with torch.no_grad():
        return network.eval()(torch.tensor([IDS]))[0].numpy()


def test_centres_are_those_of_lloyds_iteration(learned: Learned) -> None:
    """Of one layer at a time; a share of what all layers have together idles."""
    config, windows = learned.checkpoint.config, learned.corpus.windows[:8]
    tensors = {name: value.numpy() for name, value in learned.network.state_dict().items()}
    weights = neuron_weights(learned.network, windows)
    found = fit_centres(learned.network, windows, weights, 0.6)
    streams = [reference.embedded(config, tensors, w, np.arange(len(w))) for w in windows]
    layers = []
    for i, weight in enumerate(weights):
        blocks = [
            reference.block(config, tensors, i, x, np.arange(len(x)), reference.ReferenceCache()) for x in streams
        ]
        streams = [block.out for block in blocks]
        gates = [block.gate for block in blocks]
        energies = [block.up**2 / (block.out**2).sum(1, keepdims=True) for block in blocks if block.up is not None]
        gate, energy = (np.concatenate([np.concatenate(p[j : j + 4])[::8] for j in (0, 4)]) for p in (gates, energies))
        layers.append((gate, energy, weight.numpy()))
    centres = [(g * e).sum(0) / e.sum(0) for g, e, _ in layers]
    for _ in range(ROUNDS):
        sizes = [np.abs(g - c) * w for (g, _, w), c in zip(layers, centres, strict=True)]
        cut = np.quantile(np.concatenate([s[::8].ravel() for s in sizes]), 0.6)
        idle = [e * (s <= cut) for (_, e, _), s in zip(layers, sizes, strict=True)]
        centres = [(g * e).sum(0) / e.sum(0).clip(1e-20) for (g, _, _), e in zip(layers, idle, strict=True)]
    for ours, theirs in zip(found, centres, strict=True):
        assert np.median(np.abs(ours.numpy() - theirs)) < 1e-4
        assert np.abs(ours.numpy()).max() > 0.01


@pytest.mark.parametrize("biases", [False, True])
def test_with_every_neuron_kept_nothing_has_changed(biases: bool, network: Callable[[str], Network]) -> None:
    net = network("llama")
    if biases:
        lora.add_biases(net)
        with torch.no_grad():
            for layer in net.layers:
                layer.up.bias += torch.randn(layer.up.bias.shape, generator=torch.Generator().manual_seed(0))
    before = logits(net)
    method = relufied(net, np.random.default_rng(0).integers(3, 300, (8, 32)))
    assert np.abs(logits(net) - before).max() > 0.01
    method._cuts.set(-1.0)
    assert np.abs(logits(net) - before).max() < 1e-4


def test_neurons_that_idle_away_from_zero_are_left_out_for_less(network: Callable[[str], Network]) -> None:
    """As those of real models do, whose gates are mostly well below zero."""
    windows, divergences = np.random.default_rng(0).integers(3, 300, (8, 32)), {}
    for kind in ("threshold", "centred"):
        original, net = network("llama"), network("llama")
        for each in (original, net):
            lora.add_biases(each)
            with torch.no_grad():
                for layer in each.layers:
                    layer.gate.bias -= 2.0
        relufied(net, windows, kind)
        assert measure(net, windows).zeros == pytest.approx(0.7, abs=0.04)
        divergences[kind] = np.square(logits(net) - logits(original)).mean()
    assert divergences["centred"] < 0.5 * divergences["threshold"]


def test_what_is_written_is_read_back(checkpoint: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """As a whole, and as an adapter, which has no bypass in it; a training goes on from either with its centres."""
    opened = checkpoint("llama")
    network = Network.from_checkpoint(opened)
    windows = np.random.default_rng(0).integers(3, 300, (8, 32))
    result = relufied(network, windows).result()
    lora.choose(network, 0, 0, ("down",))
    with torch.no_grad():
        for layer in network.layers:
            layer.down.weight += 0.01 * torch.randn(layer.down.weight.shape, generator=torch.Generator().manual_seed(0))
        for matrix in (p for p in (*network.parameters(), *network.buffers()) if p.ndim > 1):
            matrix.copy_(matrix.half().float())
    wanted = logits(network)
    path = tmp_path / export.ADAPTER
    export.write_adapter(network, opened, result, path, base="tiny", method="relufy", about={})
    adapted = Adapted(opened, open_adapter(path))
    export.write(network, opened, result, tmp_path / "out")
    whole = open_checkpoint(tmp_path / "out")
    assert adapted.config.hidden_act == whole.config.hidden_act == "centred_silu"
    assert not any("bypass" in name for name in open_adapter(path).entries)
    for found, close in ((whole, 1e-3), (adapted, 0.15)):
        tensors = {name: found.read(name) for name in found.config.shapes()}
        assert np.abs(reference.forward(found.config, tensors, IDS) - wanted).mean() < close
        again = Network.from_checkpoint(found)
        assert np.abs(logits(again) - wanted).mean() < close
        for i, layer in enumerate(network.layers):
            name = f"layers.{i}.bypass.weight"
            np.testing.assert_allclose(tensors[name], layer.bypass.weight.numpy(), atol=1e-3)
            np.testing.assert_array_equal(found.read(name, 3, 9), tensors[name][3:9])
        goes_on = relufied(again, windows).result()
        for i in range(len(again.layers)):
            name = f"layers.{i}.act_centre.weight"
            np.testing.assert_array_equal(goes_on.vectors[name], tensors[name])
            assert torch.equal(again.layers[i].bypass.weight, torch.from_numpy(tensors[f"layers.{i}.bypass.weight"]))


@pytest.mark.parametrize("family", ["gemma3", "opt", "bamboo", "llama-relu", "llama-fatsilu"])
def test_models_that_cannot_be_centred_say_so(family: str, network: Callable[[str], Network]) -> None:
    assert usual(network(family).config) == "threshold"
    assert usual(network("llama").config) == "centred"
    with pytest.raises(ValueError, match="can be centred"):
        relufied(network(family), np.random.default_rng(0).integers(3, 300, (8, 32)))


def test_a_centred_model_stays_centred(network: Callable[[str], Network]) -> None:
    net, windows = network("llama-centred"), np.random.default_rng(0).integers(3, 300, (8, 32))
    assert usual(net.config) == "centred"
    with pytest.raises(ValueError, match="go on with --activation centred"):
        relufied(net, windows, "threshold")
    with pytest.raises(ValueError, match="by thresholds already"):
        TopKMethod(net, Rise(0.5, 10, 0.5))


def test_a_run_that_was_killed_goes_on_with_its_centres(learned: Learned, tmp_path: Path) -> None:
    """Whatever a new fit would find: the bypass and the centres belong together."""
    plan, windows = Plan(6, 1e-3, batch=2), learned.corpus.windows
    whole = learned.student()
    unbroken = learned.train(whole, relufied(whole, windows), plan, tmp_path / "whole")
    broken = learned.student()
    method = relufied(broken, windows)
    goes_on = method.begin

    def begin(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        goes_on(step)

    method.begin = begin  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        learned.train(broken, method, plan, tmp_path / "broken")
    resumed = learned.student()
    other = relufied(resumed, np.random.default_rng(0).integers(3, 300, (8, 32)))
    assert not torch.equal(resumed.layers[0].bypass.weight, whole.layers[0].bypass.weight)
    again = learned.train(resumed, other, plan, tmp_path / "broken")
    assert again.step == unbroken.step == 6
    for name, value in whole.state_dict().items():
        if "bypass" in name or "centre" in name:
            assert torch.equal(value, resumed.state_dict()[name]), name
