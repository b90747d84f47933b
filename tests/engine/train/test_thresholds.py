"""Cuts make the wanted share zero, and weigh neurons by what they do to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fewfire import reference
from fewfire.train.measure import measure
from fewfire.train.network import Network
from fewfire.train.thresholds import Cuts, neuron_weights, quantile
from learning import Learned


def test_quantile() -> None:
    values = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    assert [quantile(values, share) for share in (0.0, 0.2, 0.5, 1.0)] == [1.0, 1.0, 2.0, 5.0]
    many = torch.rand(10_001, generator=torch.Generator().manual_seed(0))
    assert float((many <= quantile(many, 0.73)).float().mean()) == pytest.approx(0.73, abs=1e-4)


def test_weights_are_those_of_the_reference(learned: Learned) -> None:
    config = learned.checkpoint.config
    weights = {name: value.numpy() for name, value in learned.network.state_dict().items()}
    windows = learned.corpus.windows[:6]
    found = neuron_weights(learned.network, windows)
    streams = [reference.embedded(config, weights, w, np.arange(len(w))) for w in windows]
    for i, weight in enumerate(found):
        blocks = [
            reference.block(config, weights, i, x, np.arange(len(x)), reference.ReferenceCache()) for x in streams
        ]
        streams = [block.out for block in blocks]
        up = np.concatenate([block.up for block in blocks if block.up is not None])
        stream = np.concatenate([block.out for block in blocks])
        shares = up**2 / (stream**2).sum(1, keepdims=True)
        wanted = np.linalg.norm(weights[f"layers.{i}.down.weight"], axis=0) * np.sqrt(shares.mean(0))
        assert weight.numpy() == pytest.approx(wanted, rel=1e-3)


def test_models_without_an_up_matrix(network: Callable[[str], Network]) -> None:
    net = network("opt")
    (first, *_) = neuron_weights(net, np.random.default_rng(0).integers(3, 300, (2, 16)))
    ratio = first / net.layers[0].down.weight.detach().norm(dim=0)
    assert ratio.numpy() == pytest.approx(np.full(len(ratio), float(ratio[0])), rel=1e-4)


@pytest.mark.parametrize("uniform", [False, True])
def test_calibrating_makes_the_wanted_share_zero(learned: Learned, uniform: bool) -> None:
    student, windows = learned.student(), learned.corpus.windows
    cuts = Cuts(student, "silu", neuron_weights(student, windows[:8]), uniform)
    assert measure(student, windows[:20]).zeros == 0
    cuts.calibrate(student, windows[:40], 0.6)
    found = measure(student, windows[:40])
    assert found.zeros == pytest.approx(0.6, abs=0.02)
    spread = max(found.layers) - min(found.layers)
    assert spread < 0.04 if uniform else spread > 0.1
    assert len({float(part.cut) for part in cuts.parts}) == (3 if uniform else 1)


def test_weighing_and_sharing_a_cut_do_less_damage(learned: Learned) -> None:
    """At the same share of zeros, in the order: sizes as they are, weighed in each layer, weighed over all layers."""
    windows, losses = learned.corpus.windows, []
    for weighed, uniform in ((False, True), (True, True), (True, False)):
        student = learned.student()
        weights = neuron_weights(student, windows[:8])
        cuts = Cuts(student, "silu", weights if weighed else [torch.ones_like(w) for w in weights], uniform)
        cuts.calibrate(student, windows[:40], 0.6)
        losses.append(learned.divergence(student))
    assert losses[0] > losses[1] > losses[2]


def test_moving_goes_part_of_the_way(learned: Learned) -> None:
    student, windows = learned.student(), learned.corpus.windows
    cuts = Cuts(student, "silu", neuron_weights(student, windows[:8]))
    cuts.calibrate(student, windows[:20], 0.5)
    before = float(cuts.parts[0].cut)
    student.train()
    targets = []
    for by in (1.0, 0.25):
        cuts.set(before)
        cuts.track(True)
        with torch.no_grad():
            student(torch.from_numpy(windows[:8].astype(np.int64)))
        cuts.move(0.8, by=by)
        targets.append(float(cuts.parts[0].cut))
    assert targets[1] - before == pytest.approx((targets[0] - before) / 4, rel=1e-4)
    assert all(part.samples == [] for part in cuts.parts)
