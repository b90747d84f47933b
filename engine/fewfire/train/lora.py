"""Which weights training moves: all of a projection, or a low-rank update of it (LoRA, 2106.09685).

A low-rank update of W `(out, in)` is B A, with A `(r, in)` and B `(out, r)`; A starts at random, B at zero, so that
nothing changes at first. There is no factor alpha / r: the learning rate does what it would do. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewfire.train.network import Network

PROJECTIONS = ("gate", "up", "down")  # what sparsity disturbs
NORMS = ("attn_norm", "ffn_norm", "attn_post_norm", "ffn_post_norm")


class LowRank(nn.Module):
    """A projection whose weight stays, plus B A."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, into = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.A = nn.Parameter((torch.randn(rank, into, generator=generator) / into**0.5).to(device))
        self.B = nn.Parameter(torch.zeros(out, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias) + functional.linear(functional.linear(x, self.A), self.B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One plain projection that does the same."""
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight + self.B @ self.A), self.bias
        return linear


def add_biases(network: Network) -> None:
    """Gives the FFNs' projections biases of zero where a model has none."""
    for layer in network.layers:
        for name in PROJECTIONS:
            linear = getattr(layer, name)
            if linear is not None and linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.weight.shape[0]))
    network.config = replace(network.config, ffn_bias=True)


def choose(network: Network, rank: int, seed: int, projections: Sequence[str] = PROJECTIONS) -> None:
    """Lets some projections of the layers move, as a whole (rank 0) or by a low-rank update, all biases of the FFNs,
    routers and norms.

    Raises `ValueError` for a rank that would save nothing.
    """
    if not 0 <= rank < min(network.config.hidden_size, network.config.intermediate_size):
        raise ValueError(f"rank must be from 0 (a full update) to under the hidden size, not {rank}")
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in network.layers:
        for name in PROJECTIONS:
            linear = getattr(layer, name)
            if linear is None:
                continue
            linear.requires_grad_(True)
            linear.weight.requires_grad_(name in projections and not rank)
            if rank and name in projections:
                setattr(layer, name, LowRank(linear, rank, generator))
        layer.activation.requires_grad_(True)  # routers
        for name in NORMS:
            if (norm := getattr(layer, name)) is not None:
                norm.requires_grad_(True)


def merge(network: Network) -> None:
    """Makes plain projections of all that have a low-rank update."""
    for layer in network.layers:
        for name, part in list(layer.named_children()):
            if isinstance(part, LowRank):
                setattr(layer, name, part.merged())


def trainable(network: Network) -> Iterator[tuple[str, nn.Parameter]]:
    """What moves, by name."""
    return ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)
