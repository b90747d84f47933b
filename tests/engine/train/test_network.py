"""The network computes what the reference does, and its gradients are those of what it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from fewfire import reference
from fewfire.checkpoint import Checkpoint, open_checkpoint
from fewfire.train.network import LayerState, Network

TOLERANCE = 1e-4  # logits spread over 1 to 3
ODD = {
    "hidden_size": 40,
    "intermediate_size": 50,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "vocab_size": 311,
}


def tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.read(name) for name in checkpoint.config.shapes()}


def windows(checkpoint: Checkpoint, count: int = 2, length: int = 40) -> list[list[int]]:
    return [tiny.prompt(length, vocab_size=checkpoint.config.vocab_size, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_computes_what_the_reference_does(family: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    opened = checkpoint(family)
    ids = windows(opened)
    with torch.no_grad():
        logits = Network.from_checkpoint(opened)(torch.tensor(ids)).numpy()
    for window, ours in zip(ids, logits, strict=True):
        assert np.abs(ours - reference.forward(opened.config, tensors(opened), window)).max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_it_does_so_at_odd_sizes(family: str, tmp_path: Path) -> None:
    opened = open_checkpoint(tiny.write_tiny(family, tmp_path, seed=1, **ODD))
    (ids,) = windows(opened, 1, 33)
    with torch.no_grad():
        logits = Network.from_checkpoint(opened)(torch.tensor([ids])).numpy()[0]
    assert np.abs(logits - reference.forward(opened.config, tensors(opened), ids)).max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama-fatsilu", "llama-norm-relu", "gemma3", "opt", "bamboo"])
def test_observers_see_what_the_reference_has_in_between(family: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    opened = checkpoint(family)
    config, weights = opened.config, tensors(opened)
    (ids,) = windows(opened, 1)
    states: list[LayerState] = []
    with torch.no_grad():
        Network.from_checkpoint(opened).hidden(torch.tensor([ids]), lambda number, state: states.append(state))
    positions = np.arange(len(ids))
    x = reference.embedded(config, weights, np.array(ids), positions)
    assert len(states) == config.num_hidden_layers
    for i, state in enumerate(states):
        block = reference.block(config, weights, i, x, positions, reference.ReferenceCache())
        for name in ("gate", "up", "fired", "out"):
            wanted = getattr(block, name)
            found = getattr(state, name)
            assert (found is None) == (wanted is None)
            if wanted is not None:
                assert np.abs(found[0].numpy() - wanted).max() < TOLERANCE
        assert np.abs(state.ffn[0].numpy() - (block.out - block.residual)).max() < TOLERANCE
        x = block.out


@pytest.mark.parametrize("family", ["llama-bias", "qwen3", "gemma3", "opt"])
def test_gradients_are_those_of_finite_differences(family: str, network: Callable[[str], Network]) -> None:
    """Along a random direction in all parameters at once, in double precision."""
    net = network(family).double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (2, 20), generator=generator)
    weights = torch.randn(2, 20, net.config.vocab_size, generator=generator, dtype=torch.float64)
    parameters = list(net.parameters())
    steps = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    (net(ids) * weights).sum().backward()
    slope = sum(float((p.grad * step).sum()) for p, step in zip(parameters, steps, strict=True) if p.grad is not None)

    def at(distance: float) -> float:
        with torch.no_grad():
            for p, step in zip(parameters, steps, strict=True):
                p += distance * step
            value = float((net(ids) * weights).sum())
            for p, step in zip(parameters, steps, strict=True):
                p -= distance * step
        return value

    assert (at(1e-6) - at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-4)


def test_tensors_are_taken_over_without_a_copy(checkpoint: Callable[[str], Checkpoint]) -> None:
    opened = checkpoint("llama")
    weights = tensors(opened)
    net = Network(opened.config, weights)
    assert net.layers[0].gate.weight.data_ptr() == weights["layers.0.gate.weight"].ctypes.data


def test_windows_past_the_context_are_refused(network: Callable[[str], Network]) -> None:
    net = network("llama")
    with pytest.raises(ValueError, match="longer than the model's"):
        net(torch.zeros(1, net.config.max_position_embeddings + 1, dtype=torch.int64))
