"""Down projections by least squares: near to the original again, with the error that NumPy finds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import tiny
from fewfire.train import log, lora, reconstruct
from fewfire.train.network import Network
from fewfire.train.run import TRAINING, Options, train
from fewfire.train.thresholds import Cuts, neuron_weights
from fewfire.train.trainer import Trainer
from learning import Learned

WINDOWS = np.random.default_rng(0).integers(3, 300, (40, 32))


def sparse(network: Network, windows: np.ndarray) -> Network:
    Cuts(network, "silu", neuron_weights(network, windows)).calibrate(network, windows, 0.7)
    return network


def test_what_is_missing_is_made_up_for_on_other_text(learned: Learned) -> None:
    net, seen = sparse(learned.student(), learned.corpus.windows), learned.corpus.windows
    before, gates = learned.divergence(net), [layer.gate.weight.clone() for layer in net.layers]
    lora.add_biases(net)
    reconstruct.reconstruct(net, learned.network, seen)
    assert before > 0.003
    assert learned.divergence(net) < 0.7 * before
    assert all(torch.equal(layer.gate.weight, gate) for layer, gate in zip(net.layers, gates, strict=True))


def test_the_regression_is_that_of_numpy(network: Callable[[str], Network]) -> None:
    """In a layer whose input is not the original's any more."""
    original, net, ids = network("llama"), sparse(network("llama"), WINDOWS), torch.from_numpy(WINDOWS)
    lora.add_biases(net)
    down = net.layers[1].down
    with torch.no_grad():
        state = net.step(1, net.step(0, net.start(ids)).out)
        wanted = original.step(1, original.step(0, original.start(ids)).out).out
        before = down.weight.clone()
        reconstruct.fit(down, [reconstruct.Inputs(state.fired, state.out - state.ffn)], [wanted])
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
    assert np.abs((down.weight - before).detach().numpy() - change[:-1].T).max() < 1e-3 * np.abs(change).max()
    assert np.abs(down.bias.detach().numpy() - change[-1]).max() < 1e-3 * np.abs(change).max()


def test_each_layer_makes_up_for_those_before_it(network: Callable[[str], Network]) -> None:
    """The original's stream is what a layer is fitted to, not its own with nothing left out."""
    original, net = network("llama"), sparse(network("llama"), WINDOWS)
    lora.add_biases(net)
    fitted: list[torch.Tensor] = []
    real = reconstruct.fit

    def fit(down: torch.nn.Linear, inputs: list[reconstruct.Inputs], wanted: list[torch.Tensor]) -> None:
        fitted.append(torch.cat(wanted))
        real(down, inputs, wanted)

    with mock.patch.object(reconstruct, "fit", fit):
        reconstruct.reconstruct(net, original, WINDOWS)
    states: list[torch.Tensor] = []
    with torch.no_grad():
        original.hidden(torch.from_numpy(WINDOWS), lambda number, state: states.append(state.out))
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(fitted, states, strict=True))


def test_a_silent_layer_is_left_with_its_bias(network: Callable[[str], Network]) -> None:
    down = network("llama").layers[0].down
    down.bias = torch.nn.Parameter(torch.zeros(down.weight.shape[0]))
    fired, before = torch.zeros(2, 5, down.weight.shape[1]), torch.randn(2, 5, down.weight.shape[0])
    weight = down.weight.clone()
    with torch.no_grad():
        reconstruct.fit(down, [reconstruct.Inputs(fired, before)], [before + 0.5])
    assert torch.equal(down.weight, weight)
    assert (down.bias - 0.5).abs().max() < 0.2


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(tiny.PARAGRAPH * 12)
    options = Options(tokens=600, window=32, batch=4, sparsity=0.7, reconstruct=True)
    found, step = [], Trainer._train
    for stop in (None, 2):
        out = tmp_path / str(stop)

        def train_until(trainer: Trainer, stop: int | None = stop) -> None:
            if trainer.step == stop:
                raise KeyboardInterrupt
            step(trainer)

        with mock.patch.object(Trainer, "_train", train_until), suppress(KeyboardInterrupt):
            train("relufy", str(tiny_path("llama")), out, [book], options)
        if stop:
            assert not (out / "config.json").exists()
            train("relufy", str(tiny_path("llama")), out, [book], options)
        entries = log.read(out / TRAINING / log.NAME)
        assert entries[0]["zeros"] == pytest.approx(0.7, abs=0.05), "the wanted sparsity from the beginning"
        found.append([entry["loss"] for entry in log.steps(entries)])
    assert found[0] == found[1]


def test_nothing_changes_where_nothing_is_left_out(learned: Learned) -> None:
    net = learned.student()
    lora.add_biases(net)
    reconstruct.reconstruct(net, learned.network, learned.corpus.windows)
    assert learned.divergence(net) < 1e-9


def test_a_norm_after_down_is_refused(network: Callable[[str], Network]) -> None:
    with pytest.raises(ValueError, match="--reconstruct needs a model"):
        reconstruct.reconstruct(network("gemma3"), network("gemma3"), WINDOWS)
