"""What training minimises: the distance to the teacher's predictions and to its residual stream, and activations.

All are means over tokens, in nats or as shares, so that their weights do not depend on the size of a batch. Knows
nothing of networks.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TopLogits(NamedTuple):
    """The k largest of a teacher's logits, and the logarithm of the sum of all their exponentials."""

    values: Tensor  # (..., k) float32
    ids: Tensor  # (..., k) int64
    total: Tensor  # (...) float32: log sum exp of all logits


def top_logits(logits: Tensor, k: int, temperature: float = 1.0) -> TopLogits:
    """Of `(..., vocab)` logits, divided by a temperature."""
    logits = logits / temperature if temperature != 1.0 else logits
    values, ids = logits.topk(k, dim=-1)
    return TopLogits(values, ids, logits.logsumexp(dim=-1))


def distillation(logits: Tensor, teacher: TopLogits, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats, the mean over tokens; the teacher's other tokens count as one, "any other".

    logits: `(..., vocab)` of the student; teacher: made with the same temperature. With all tokens in `teacher` it is
    the exact divergence (Hinton et al., 1503.02531, section 2), with k of them a lower bound of it. Times the
    temperature squared, as there, so that gradients keep their size.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    k = teacher.ids.shape[-1]
    each = _Divergence.apply(flat / temperature if temperature != 1.0 else flat, *_flat(teacher, k))
    return each.mean() * temperature**2


def _flat(teacher: TopLogits, k: int) -> TopLogits:
    return TopLogits(teacher.values.reshape(-1, k), teacher.ids.reshape(-1, k), teacher.total.reshape(-1))


_TINY = 1e-9  # a probability under which a tail counts as empty


class _Divergence(torch.autograd.Function):
    """sum over the k of p log(p / q) + p' log(p' / q'), p' and q' the rest of the probability, for each token.

    Its derivative by a logit is q m - p for the k, and q (m - p' / q') for the others, where m is what p and p' add up
    to: 1, or nearly so. That is one pass over the vocabulary, where differentiating the formula takes many.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, values: Tensor, ids: Tensor, total: Tensor) -> Tensor:
        q = torch.softmax(logits, dim=-1)  # (N, vocab)
        log_p = values - total[:, None]
        p, log_q = log_p.exp(), logits.gather(-1, ids) - logits.logsumexp(dim=-1, keepdim=True)
        rest_p = (1 - p.sum(dim=-1)).clamp_min(0)
        rest_q = q.sum(dim=-1) - q.gather(-1, ids).sum(dim=-1)
        counts = rest_p > _TINY
        rest_q = torch.where(counts, rest_q.clamp_min(_TINY), torch.ones_like(rest_q))
        each = (p * (log_p - log_q)).sum(dim=-1)
        each = each + torch.where(counts, torch.xlogy(rest_p, rest_p / rest_q), torch.zeros_like(each))
        mass = p.sum(dim=-1) + torch.where(counts, rest_p, torch.zeros_like(rest_p))
        ctx.save_for_backward(q, p, ids, mass, torch.where(counts, rest_p / rest_q, torch.zeros_like(rest_q)))
        return each

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        q, p, ids, mass, ratio = ctx.saved_tensors
        out = q * (grad * (mass - ratio))[:, None]
        out.scatter_(-1, ids, (q.gather(-1, ids) * mass[:, None] - p) * grad[:, None])
        return out, None, None, None


def relative_error(stream: Tensor, teacher: Tensor) -> Tensor:
    """|stream - teacher|² / |teacher|² of the residual stream `(..., hidden)`, the mean over tokens.

    Divided token by token, because the next norm is, and because some tokens' streams are a thousand times larger.
    """
    difference = (stream - teacher).square().sum(dim=-1)
    return (difference / teacher.square().sum(dim=-1).clamp_min(1e-30)).mean()


def l1(fired: Tensor) -> Tensor:
    """The L1 norm of a layer's intermediate output `(..., neurons)`, the mean over tokens.

    ProSparse (2402.13516, section 3.2, progressive sparsity regularization) adds it for every layer, times a factor.
    """
    return fired.abs().sum(dim=-1).mean()


def rising(step: int, ends: list[int], factors: list[float]) -> float:
    """The factor of ProSparse's regularization at a step (2402.13516, section 3.2).

    Constant at factors[0] up to step ends[0], its warm-up; then from each factor to the next along a sine from trough
    to peak, over the steps between two ends; constant after the last.
    """
    if step <= ends[0]:
        return factors[0]
    for (start, end), (low, high) in zip(pairwise(ends), pairwise(factors), strict=True):
        if step <= end:
            return low + (high - low) * (math.sin(math.pi * ((step - start) / (end - start) - 0.5)) + 1) / 2
    return factors[-1]
