"""Each method makes the zeros that its paper speaks of, and the model learns to live with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from fewfire.selectors.top import count
from fewfire.train import log, lora
from fewfire.train.layerwise import Layerwise
from fewfire.train.measure import measure
from fewfire.train.method import Method
from fewfire.train.network import Network
from fewfire.train.relufy import Relufy, shift, thresholded
from fewfire.train.rise import Rise
from fewfire.train.topk import TopKMethod
from fewfire.train.trainer import Plan
from learning import Learned, learn

PLAN = Plan(steps=40, rate=2e-3, batch=8, at_once=8, measured=2)


@dataclass
class Moved:
    """How a student stands: its exact zeros, and how far it is from the original."""

    zeros: float
    kl: float


def state(learned: Learned, student: Network) -> Moved:
    return Moved(measure(student, learned.corpus.held_out).zeros, learned.divergence(student))


def trained(learned: Learned, student: Network, method: Method, directory: Path, rank: int = 0) -> tuple[Moved, Moved]:
    """Before the first step and after the last."""
    before = state(learned, student)
    lora.choose(student, rank, 0)
    learned.train(student, method, PLAN, directory)
    return before, state(learned, student)


def zeros(student: Network, windows: np.ndarray) -> torch.Tensor:
    """How many neurons of each layer are not zero, `(layers, tokens)`."""
    counts: list[torch.Tensor] = []
    with torch.no_grad():
        student.hidden(
            torch.from_numpy(windows.astype(np.int64)), lambda i, s: counts.append((s.gate != 0).sum(-1).flatten())
        )
    return torch.stack(counts)


def test_relu_makes_zeros_and_the_loss_recovers(learned: Learned, tmp_path: Path) -> None:
    student = learned.student()
    method = Relufy(student, learned.corpus.windows, None, PLAN.steps, kind="relu")
    before, after = trained(learned, student, method, tmp_path)
    assert state(learned, learned.network) == Moved(0.0, 0.0)
    assert after.zeros > 0.3
    assert before.kl > 0.003
    assert after.kl < 0.6 * before.kl
    result = method.result()
    assert result.config == {"hidden_act": "relu"}
    assert not result.vectors


def test_relu_after_the_norms(learned: Learned, tmp_path: Path) -> None:
    student = learned.student()
    method = Relufy(student, learned.corpus.windows, None, PLAN.steps, kind="relu", stage=2)
    before, after = trained(learned, student, method, tmp_path)
    assert all(isinstance(layer.norm_activation, torch.nn.ReLU) for layer in student.layers)
    assert after.kl < 0.3 * before.kl
    assert method.result().config == {"hidden_act": "relu", "norm_relu": True}


def test_a_shift_makes_more_zeros(learned: Learned, tmp_path: Path) -> None:
    shares = []
    for by in (0.0, 0.5):
        student = learned.student()
        shift(student, by)
        assert all((layer.gate.bias == -by).all() for layer in student.layers)
        assert all((layer.up.bias == 0).all() and (layer.down.bias == 0).all() for layer in student.layers)
        method = Relufy(student, learned.corpus.windows, None, PLAN.steps, kind="shifted")
        before, after = trained(learned, student, method, tmp_path / str(by))
        shares.append(after.zeros)
        assert after.kl < before.kl
        assert student.config.ffn_bias
        assert method.result().config == {"hidden_act": "relu"}
        assert any((layer.gate.bias != -by).any() for layer in student.layers)  # shifts move by neuron
    assert shares[1] > shares[0] + 0.05


def test_regularization_makes_zeros(learned: Learned, tmp_path: Path) -> None:
    """ProSparse's L1, whose factor rises."""
    shares = []
    for factor in (0.0, 10.0):
        student = learned.student()
        method = Relufy(student, learned.corpus.windows, None, PLAN.steps, kind="relu", regularization=factor)
        directory = tmp_path / str(factor)
        shares.append(trained(learned, student, method, directory)[1].zeros)
        if factor:
            losses = [entry["l1"] for entry in log.read(directory / log.NAME) if "l1" in entry]
            assert losses[0] == pytest.approx(losses[1], rel=0.3)  # in the warm-up
            assert max(losses[-15:]) > 3 * losses[0]
    assert shares[1] > shares[0] + 0.05


def test_thresholds_at_the_end_of_relu(learned: Learned, tmp_path: Path) -> None:
    student = learned.student()
    rise = Rise(0.75, PLAN.steps)
    method = Relufy(student, learned.corpus.windows, rise, PLAN.steps, kind="relu")
    after = trained(learned, student, method, tmp_path)[1]
    measured = [entry["zeros"] for entry in log.read(tmp_path / log.NAME) if "perplexity" in entry]
    assert max(measured[:-1]) < 0.7
    assert after.zeros == pytest.approx(0.75, abs=0.03)
    result = method.result()
    assert result.config == {"hidden_act": "fatrelu"}
    assert all((limit > 0).all() for limit in result.vectors.values())


@pytest.mark.parametrize("rank", [0, 6])
def test_thresholds_rise_and_the_model_keeps_up(learned: Learned, tmp_path: Path, rank: int) -> None:
    untrained = learned.student()
    Relufy(untrained, learned.corpus.windows, Rise(0.8, 1, start=0.8), 1)
    cut_at_once = state(learned, untrained)
    student = learned.student()
    method = Relufy(student, learned.corpus.windows, Rise(0.8, PLAN.steps), PLAN.steps)
    before, after = trained(learned, student, method, tmp_path, rank)
    assert cut_at_once.zeros == pytest.approx(0.8, abs=0.02)
    assert before.zeros == pytest.approx(0.5, abs=0.02)
    assert after.zeros == pytest.approx(0.8, abs=0.03)
    assert before.kl < after.kl < 0.75 * cut_at_once.kl
    steps = [entry["zeros"] for entry in log.read(tmp_path / log.NAME) if "loss" in entry]
    parts = [sum(steps[at : at + 10]) / 10 for at in (0, 10, 20)]
    assert parts == sorted(parts)
    result = method.result()
    assert result.config == {"hidden_act": "fatsilu"}
    assert [tuple(limit.shape) for limit in result.vectors.values()] == [(96,)] * 3


def test_topk_keeps_exactly_k(learned: Learned, tmp_path: Path) -> None:
    student = learned.student()
    method = TopKMethod(student, Rise(0.75, PLAN.steps))
    neurons = student.config.intermediate_size
    assert (zeros(student, learned.corpus.held_out) == count(neurons, 0.5)).all()
    after = trained(learned, student, method, tmp_path)[1]
    k = count(neurons, 0.25)
    assert (zeros(student, learned.corpus.held_out) == k).all()
    assert method.result().sparsity == {"version": 1, "method": "topk", "k": [k] * 3}
    untrained = learned.student()
    TopKMethod(untrained, Rise(0.75, 1, start=0.75))
    assert after.kl < 0.75 * state(learned, untrained).kl


def test_topk_from_scratch(tmp_path: Path) -> None:
    """As the paper trains: with Top-k in place from the first step."""
    path = tiny.write_tiny("llama-relu", tmp_path / "model")
    learned = learn(path, tmp_path / "run", lambda network: TopKMethod(network, Rise(0.9, 1, start=0.9)))
    assert measure(learned.network, learned.corpus.held_out).perplexity < 2.5  # 300 at first
    assert (zeros(learned.network, learned.corpus.held_out) <= count(96, 0.1)).all()


def test_layers_stay_nearer_where_that_is_asked_for(learned: Learned, tmp_path: Path) -> None:
    errors = []
    for weight in (0.0, 3.0):
        student = learned.student()
        method = Relufy(student, learned.corpus.windows, Rise(0.7, PLAN.steps), PLAN.steps)
        wrapped = Layerwise(method, learned.network, weight)
        trained(learned, student, wrapped, tmp_path / str(weight))
        wrapped.watch(ids := torch.from_numpy(learned.corpus.held_out.astype(np.int64)))
        with torch.no_grad():
            student.hidden(ids, wrapped.observe)
        errors.append(float(torch.stack(wrapped._errors).mean()))
        assert wrapped.result().config == {"hidden_act": "fatsilu"}
    assert errors[1] < 0.9 * errors[0]


def test_which_activations_can_be_cut_off() -> None:
    assert thresholded("relu") == "fatrelu"
    with pytest.raises(ValueError, match="use --activation relu"):
        thresholded("gelu_tanh")
