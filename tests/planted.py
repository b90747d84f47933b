"""Layers that are made up, so that it is known what there is to find in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fewfire import reference
from fewfire.config import Activation, ModelConfig, Rope
from fewfire.observe import Layer
from fewfire.packed import Packed

HIDDEN, NEURONS = 128, 200
THRESHOLD = 1.5  # of what has one
_CENTRE = -0.2
_ONSET: dict[Activation, float] = {"fatrelu": THRESHOLD, "centred_silu": 1.5702}  # whose SiLU is 1.3


def packed(weights: str = "f32", act: Activation = "silu", neurons: int = NEURONS) -> Packed:
    """A packed model without any weights: what fitting asks it for is its config and its formats."""
    config = ModelConfig(
        "planted",
        100,
        HIDDEN,
        neurons,
        1,
        2,
        2,
        64,
        256,
        hidden_act=act,
        rope=Rope(1e4),
    )
    return Packed(Path("planted"), "planted", config, weights, {})


def layer(
    random: np.random.Generator, act: Activation = "silu", tokens: int = 2048, rank: int = 8, neurons: int = NEURONS
) -> Layer:
    """Gates of a rank, on inputs that differ a lot in size; unless it is SiLU, they have a bias, and a fifth fires."""

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    sizes = np.geomspace(0.2, 3, HIDDEN).astype(np.float32)
    x = normal(tokens, HIDDEN) * sizes + 1
    gate = normal(neurons, rank) @ normal(rank, HIDDEN) / np.float32((rank * HIDDEN) ** 0.5)
    tensors = {"gate.weight": gate, "down.weight": normal(HIDDEN, neurons)}
    config = packed(act=act, neurons=neurons).config
    if act != "silu":
        tensors["gate.bias"] = -np.quantile(x @ gate.T, 0.8, axis=0).astype(np.float32)
    if act in _ONSET:
        tensors["act_threshold.weight"] = np.full(neurons, THRESHOLD, np.float32)
        tensors["gate.bias"] += np.float32(_ONSET[act])
    if act == "centred_silu":
        tensors["act_centre.weight"] = np.full(neurons, _CENTRE, np.float32)
        tensors["bypass.weight"] = normal(HIDDEN, HIDDEN)
    limits = tensors.get("act_threshold.weight"), tensors.get("act_centre.weight")
    activated = reference.activate(config, reference.linear(tensors, "gate", x), *limits)
    up = normal(tokens, neurons)
    early = x + normal(tokens, HIDDEN) * sizes / 2
    return Layer(0, early, x, x, activated, up, activated * up, normal(tokens, HIDDEN), tensors)
