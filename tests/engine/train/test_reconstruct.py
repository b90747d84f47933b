"""Down projections by least squares: near to the original again, with the error that NumPy finds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fewfire.train import reconstruct
from fewfire.train.network import Network
from fewfire.train.thresholds import Cuts, neuron_weights
from learning import Learned

WINDOWS = np.random.default_rng(0).integers(3, 300, (40, 32))


def sparse(network: Network, windows: np.ndarray) -> Network:
    Cuts(network, "silu", neuron_weights(network, windows)).calibrate(network, windows, 0.7)
    return network


def test_what_is_missing_is_made_up_for_on_other_text(learned: Learned) -> None:
    net, seen = sparse(learned.student(), learned.corpus.windows), learned.corpus.windows
    before, gates = learned.divergence(net), [layer.gate.weight.clone() for layer in net.layers]
    reconstruct.reconstruct(net, learned.network, seen)
    assert before > 0.003
    assert learned.divergence(net) < 0.5 * before
    assert all(torch.equal(layer.gate.weight, gate) for layer, gate in zip(net.layers, gates, strict=True))


def test_the_regression_is_that_of_numpy(network: Callable[[str], Network]) -> None:
    original, net = network("llama"), sparse(network("llama"), WINDOWS)
    layer, ids = net.layers[0], torch.from_numpy(WINDOWS)
    with torch.no_grad():
        state, wanted = net.step(0, net.start(ids)), original.step(0, original.start(ids)).out
        before = layer.down.weight.clone()
        reconstruct.fit(layer.down, [reconstruct.Inputs(state.fired, state.out - state.ffn)], [wanted])
    size = np.linalg.norm(wanted.flatten(0, 1).double().numpy(), axis=1, keepdims=True)
    x = state.fired.flatten(0, 1).double().numpy()
    missing = (wanted - state.out).flatten(0, 1).double().numpy() / size
    rows = np.concatenate([x, np.ones_like(size)], axis=1) / size
    ridge = np.sqrt(reconstruct.RIDGE * np.square(rows[:, :-1]).sum(axis=0).mean())
    kept = ridge * np.eye(x.shape[1] + 1)[:-1]
    change, *_ = np.linalg.lstsq(
        np.concatenate([rows, kept]), np.concatenate([missing, np.zeros((len(kept), missing.shape[1]))]), rcond=None
    )
    assert np.abs(change[:-1].T).max() > 0.01
    assert np.abs((layer.down.weight - before).detach().numpy() - change[:-1].T).max() < 1e-3 * np.abs(change).max()
    assert np.abs(layer.down.bias.detach().numpy() - change[-1]).max() < 1e-3 * np.abs(change).max()


def test_nothing_changes_where_nothing_is_left_out(learned: Learned) -> None:
    net = learned.student()
    reconstruct.reconstruct(net, learned.network, learned.corpus.windows)
    assert learned.divergence(net) < 1e-9


def test_a_norm_after_down_is_refused(network: Callable[[str], Network]) -> None:
    with pytest.raises(ValueError, match="--reconstruct needs a model"):
        reconstruct.reconstruct(network("gemma3"), network("gemma3"), WINDOWS)
