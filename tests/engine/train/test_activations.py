"""Each activation keeps what it says, and gradients reach what is kept alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewfire.selectors.threshold import per_neuron
from fewfire.train.activations import SAMPLED, Plain, Threshold, TopK


def test_topk_keeps_exactly_k_even_of_equals() -> None:
    x = torch.randn(5, 7, 40, generator=torch.Generator().manual_seed(0))
    x[0] = 1.5
    for k in (1, 13, 40):
        y = TopK("silu", k)(x)
        assert ((y != 0).sum(-1) == k).all()
        assert torch.equal(y[y != 0], Plain("silu")(x)[y != 0])


def test_topk_keeps_the_largest_absolute_values() -> None:
    y = TopK("silu", 2)(torch.tensor([3.0, -1.0, 0.1, 0.2]))  # silu: 2.86, -0.27, 0.05, 0.11
    assert (y != 0).tolist() == [True, True, False, False]


def test_a_threshold_keeps_what_is_over_it() -> None:
    part = Threshold("silu", torch.tensor([1.0, 2.0, 4.0]))
    x = torch.tensor([[1.0, 1.0, 1.0], [0.4, -1.0, -1.0]])  # silu: 0.731, and 0.239, -0.269, -0.269
    assert torch.equal(part(x), torch.nn.functional.silu(x))
    part.set(0.6)
    assert part.least.tolist() == pytest.approx([0.6, 0.3, 0.15])
    assert (part(x) != 0).tolist() == [[True, True, True], [False, False, True]]
    assert np.allclose(part.least, per_neuron(0.6, part.weight.numpy()))  # what the engine's calibration would have


def test_relu_over_zero_is_relu() -> None:
    part = Threshold("relu", torch.ones(50))
    part.set(0.0)
    x = torch.randn(20, 50)
    assert torch.equal(part(x), torch.relu(x))


@pytest.mark.parametrize("part", [TopK("silu", 3), Threshold("silu", torch.ones(10))])
def test_gradients_reach_what_is_kept(part: torch.nn.Module) -> None:
    if isinstance(part, Threshold):
        part.set(0.4)
    x = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kept = part(x) != 0
    assert 0 < int(kept.sum()) < kept.numel()
    (grad,) = torch.autograd.grad(part(x).sum(), x)
    (all_of_it,) = torch.autograd.grad(Plain("silu")(x).sum(), x)
    assert torch.equal(grad, torch.where(kept, all_of_it, torch.zeros_like(x)))
    assert torch.autograd.gradcheck(part, x)


def test_samples_are_left_only_while_tracking_and_training() -> None:
    part = Threshold("silu", torch.full((8,), 2.0))
    part.set(0.3)
    x = torch.randn(3, 100, 8)
    part.train()(x)
    part.tracking = True
    part.eval()(x)
    assert part.samples == []
    part.train()(x)
    (sample,) = part.samples
    assert len(sample) <= SAMPLED
    every = -(-300 // SAMPLED)
    assert torch.allclose(sample, 2 * torch.nn.functional.silu(x).abs().flatten(0, 1)[::every])  # also what is cut off
