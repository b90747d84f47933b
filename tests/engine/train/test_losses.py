"""Losses against values worked out by hand, and their gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from fewfire.train.losses import TopLogits, distillation, l1, relative_error, rising, top_logits


def double(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def test_divergence_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2); by the likeliest token alone, against the two others as one."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    exact = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5)
    assert float(distillation(q, top_logits(p, 3))) == pytest.approx(exact, abs=1e-6)
    bucket = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(distillation(q, top_logits(p, 1))) == pytest.approx(bucket, abs=1e-6)


def test_divergence_of_all_tokens_is_that_of_torch() -> None:
    p, q = double(0, 2, 7, 40), double(1, 2, 7, 40)
    wanted = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True) / 14
    assert float(distillation(q, top_logits(p, 40))) == pytest.approx(float(wanted), rel=1e-9)


def test_fewer_tokens_give_a_lower_bound() -> None:
    p, q = double(0, 30, 40), double(1, 30, 40)
    values = [float(distillation(q, top_logits(p, k))) for k in (1, 4, 16, 40)]
    assert values == sorted(values)
    assert values[0] > 0
    assert float(distillation(p, top_logits(p, 4))) == pytest.approx(0, abs=1e-9)


def test_a_temperature_softens_both_and_scales_back() -> None:
    p, q = double(0, 3, 20), double(1, 3, 20)
    wanted = 4 * float(distillation(q / 2, top_logits(p / 2, 20)))
    assert float(distillation(q, top_logits(p, 20, 2.0), 2.0)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_the_divergence(k: int, temperature: float) -> None:
    teacher = top_logits(double(0, 4, 12), k, temperature)
    logits = double(1, 4, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distillation(x, teacher, temperature), logits)


def test_rounded_probabilities_that_sum_to_more_than_one() -> None:
    """As float16 in a cache makes them: the gradient still is that of what is computed."""
    values = torch.tensor([[0.0, -0.5]], dtype=torch.float64)
    teacher = TopLogits(values, torch.tensor([[2, 0]]), values.logsumexp(-1) - 1e-3)
    logits = double(1, 1, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distillation(x, teacher), logits)


def test_relative_error_by_hand() -> None:
    teacher = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    stream = torch.tensor([[[3.0, 5.0], [2.0, 2.0]]])
    assert float(relative_error(stream, teacher)) == pytest.approx((1 / 25 + 4 / 4) / 2)
    x, wanted = double(0, 2, 3, 4).requires_grad_(), double(1, 2, 3, 4)
    assert torch.autograd.gradcheck(lambda x: relative_error(x, wanted), x)


def test_l1_by_hand() -> None:
    assert float(l1(torch.tensor([[[1.0, -2.0, 0.0], [0.0, 0.0, 5.0]]]))) == pytest.approx((3 + 5) / 2)
    assert torch.autograd.gradcheck(l1, double(0, 2, 3, 4).requires_grad_())


def test_the_factor_rises_along_sines() -> None:
    """ProSparse: constant in the warm-up, then from trough to peak between its stages, so half way in the middle."""
    ends, factors = [10, 20, 40], [0.1, 0.5, 2.0]
    at = [rising(step, ends, factors) for step in range(51)]
    assert at[:11] == [0.1] * 11
    assert at[15] == pytest.approx(0.3)
    assert at[20] == pytest.approx(0.5)
    assert at[30] == pytest.approx(1.25)
    assert at[25] == pytest.approx(0.5 + 1.5 * (1 - math.cos(math.pi / 4)) / 2)
    assert at[40:] == pytest.approx([2.0] * 11)
    assert at == sorted(at)
