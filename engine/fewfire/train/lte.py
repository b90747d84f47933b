"""The method `lte`: groups of neurons, and routers that learn together with the model which of them a token needs.

From Learn To be Efficient (2402.06126): experts are groups of 32 neurons with like gate rows (`selectors/groups.py`),
and a router gives each a score G(x) = sigmoid(x W) by itself. In stage 1 what an expert puts out is multiplied by its
score, and to the loss are added `efficiency`, the mean of G(x)², which pulls scores to 0, and `separability`, which
pushes them away from the threshold of 0.5. In stage 2 the threshold decides, the routers stay as they are, and the
model learns to do without the experts under it.

The paper's full text was not at hand, so the rest is this project's reading of it and has not been checked: the formula
of `separability`; that in stage 2 an expert over the threshold counts whole, not by its score; the weights of the two
losses, and that each stage has half of the steps (`SOFT`).

Different on purpose: routers begin with what logistic regression says of which groups are worth reading
(`selectors/router.py`), at one price for all layers, and with a bias, where the paper's begin at random and learn from
many more tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewfire.selectors.groups import balanced, count
from fewfire.selectors.router import learnt
from fewfire.selectors.scores import Linear, benefits
from fewfire.train.method import Method, Result
from fewfire.train.network import Layer, LayerState, Network

FITTED = 8  # windows that routers are fitted to
SOFT = 0.5  # share of the steps that are stage 1
NEAR = 0.1  # a distance from the threshold at which separability is half of what it is on it


def efficiency(scores: Tensor) -> Tensor:
    """The mean over tokens and experts of G(x)², as in the paper. scores: `(..., experts)`, from 0 to 1."""
    return scores.square().mean()


def separability(scores: Tensor) -> Tensor:
    """The mean over tokens and experts of 1 / ((G(x) - 0.5)² + 0.1²), from 3.8 to 100.

    A reading of the paper: large near the threshold, but finite on it, where some token's score always is.
    """
    return (1 / ((scores - 0.5).square() + NEAR**2)).mean()


class Routed(nn.Module):
    """A layer's activation, times what its router says of the groups. While it is not training, routing is hard."""

    members: Tensor
    belongs: Tensor

    def __init__(self, activation: nn.Module, members: np.ndarray, scores: Linear) -> None:
        """members: `(neurons,)`, group by group; scores: before the sigmoid, of `(groups, hidden)`."""
        super().__init__()
        self.activation, self.hard = activation, False
        self.weight = nn.Parameter(torch.from_numpy(scores.rows.astype(np.float32)))
        self.bias = nn.Parameter(torch.from_numpy(scores.bias.astype(np.float32)))
        self.register_buffer("members", torch.from_numpy(members.astype(np.int32)))
        groups = np.empty(len(members), np.int64)
        groups[members] = np.arange(len(members)) // -(-len(members) // len(scores.bias))
        one_each = functional.one_hot(torch.from_numpy(groups), len(scores.bias)).T.float()  # quicker than indexing
        self.register_buffer("belongs", one_each, persistent=False)  # (groups, neurons)
        self.scores = torch.zeros(0)  # (..., groups) of the last pass, from 0 to 1
        self._met = True  # whether the gate has met its scores: in some models the up values are activated after it

    def look(self, x: Tensor) -> None:
        """What the FFN gets, `(..., hidden)`."""
        self.scores, self._met = torch.sigmoid(functional.linear(x, self.weight, self.bias)), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(x)
        if self._met:
            return y
        self._met = True
        hard = self.hard or not self.training
        return y * ((self.scores > 0.5).to(y) if hard else self.scores).matmul(self.belongs)


class Lte(Method):
    """See the module. Adds routers to the network's layers, fitted to `windows` `(windows, T)` of ids.

    density: the share of the groups that are on at first; efficiency, separability: the weights of the losses.
    """

    def __init__(
        self,
        network: Network,
        windows: np.ndarray,
        steps: int,
        *,
        density: float = 0.5,
        efficiency: float = 0.3,
        separability: float = 0.001,
    ) -> None:
        self._steps, self._efficiency, self._separability = steps, efficiency, separability
        self._parts: list[Routed] = []
        self._kept: list[Tensor] = []
        for layer, found in zip(network.layers, fitted(network, windows[:FITTED], density), strict=True):
            part = Routed(layer.activation, *found).to(network.embed.weight.device)
            layer.activation = part
            layer.ffn_norm.register_forward_hook(_shown(layer, part))
            self._parts.append(part)

    def begin(self, step: int) -> None:
        for part in self._parts:
            part.hard = step >= SOFT * self._steps
        self._kept = []

    def observe(self, number: int, state: LayerState) -> None:
        self._kept.append((self._parts[number].scores.detach() > 0.5).float().mean())

    def losses(self) -> dict[str, Tensor]:
        if self._parts[0].hard:
            return {}
        scores = torch.stack([part.scores for part in self._parts])
        return {
            "efficiency": efficiency(scores) * self._efficiency,
            "separability": separability(scores) * self._separability,
        }

    def figures(self) -> dict[str, float]:
        return {"density": float(torch.stack(self._kept).mean())}

    def result(self) -> Result:
        tensors: dict[str, Tensor] = {}
        for i, part in enumerate(self._parts):
            for name in ("weight", "bias", "members"):
                tensors[f"layers.{i}.router.{name}"] = getattr(part, name).detach()
        return Result(sparsity={"version": 1, "method": "router"}, tensors=tensors)


def _shown(layer: Layer, part: Routed) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        part.look(layer.norm_activation(output))

    return hook


@torch.no_grad()
def fitted(network: Network, windows: np.ndarray, density: float) -> list[tuple[np.ndarray, Linear]]:
    """Groups of each layer, and scores of them that keep about such a share of all.

    A group is worth reading if leaving it out does more damage than it costs; a cost for all layers, so that those in
    which little matters keep less. Damage: the sum over its neurons of |what the neuron adds to the residual stream|²,
    over |the stream|².
    """
    seen = _Seen(network)
    seen.read(windows)
    damage = np.concatenate([np.concatenate(each) for each in seen.damage], axis=1)  # (T, layers * groups)
    worth = np.split(benefits(damage, density), len(network.layers), axis=1)
    found = []
    for layer, members, inputs, each in zip(network.layers, seen.members, seen.inputs, worth, strict=True):
        found.append((members, learnt(np.concatenate(inputs), layer.gate.weight.cpu().numpy(), each)))
    return found


class _Seen:
    """What routers are fitted to: by layer, the FFN's inputs `(T, hidden)` and each group's damage `(T, groups)`."""

    def __init__(self, network: Network) -> None:
        self._network = network
        gates = [layer.gate.weight.detach().cpu().numpy() for layer in network.layers]
        self.members = [balanced(gate, count(len(gate))) for gate in gates]
        self._sizes = [layer.down.weight.detach().norm(dim=0).cpu().numpy() for layer in network.layers]
        self.inputs: list[list[np.ndarray]] = [[] for _ in gates]
        self.damage: list[list[np.ndarray]] = [[] for _ in gates]

    def read(self, windows: np.ndarray) -> None:
        handles = [layer.ffn_norm.register_forward_hook(self._noted(i)) for i, layer in enumerate(self._network.layers)]
        device = self._network.embed.weight.device
        for window in windows:
            self._network.hidden(torch.from_numpy(window[None].astype(np.int64)).to(device), self._observe)
        for handle in handles:
            handle.remove()

    def _noted(self, number: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = self._network.layers[number].norm_activation(output)
            self.inputs[number].append(x.flatten(0, 1).cpu().numpy())

        return hook

    def _observe(self, number: int, state: LayerState) -> None:
        members, neurons = self.members[number], len(self.members[number])
        groups = count(neurons)
        size = -(-neurons // groups)
        lost = np.zeros((state.out.shape[1] * len(state.out), groups * size), np.float32)
        fired = state.fired.flatten(0, 1).cpu().numpy()
        lost[:, :neurons] = np.square(fired * self._sizes[number])[:, members]
        stream = state.out.flatten(0, 1).square().sum(dim=-1, keepdim=True).cpu().numpy()
        self.damage[number].append(lost.reshape(len(lost), groups, size).sum(axis=2) / np.maximum(stream, 1e-30))
