"""Spreading a density: how much each part of a model keeps, so that little is read and little is lost.

A model's parts (say, the gate threshold of layer 7) each have a choice of settings, of which each costs something
(bytes to read) and does damage. Damages of different parts add up, which holds as long as they are small;
then the settings that do the least damage for their cost minimise `damage + price * cost` for some price, each part by
itself (Everett 1963, generalized Lagrange multipliers; in compression: Shoham and Gersho 1988). Knows nothing of
models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_STEPS = 40  # of a bisection: prices lie up to twenty orders of magnitude apart


@dataclass(frozen=True, eq=False)
class Choice:
    """The settings that one part of a model has to choose from; `settings[i]` is whatever the caller makes of it."""

    cost: np.ndarray  # (settings,) in any unit that is the same for all parts
    damage: np.ndarray  # (settings,) likewise
    settings: Sequence[object]


def cheapest(choices: Sequence[Choice], price: float) -> list[int]:
    """The setting of each part with the least damage + price * cost; of equals, the first."""
    return [int(np.argmin(choice.damage + price * choice.cost)) for choice in choices]


def total_cost(choices: Sequence[Choice], picked: Sequence[int]) -> float:
    """What the picked settings cost together."""
    return float(sum(choice.cost[i] for choice, i in zip(choices, picked, strict=True)))


def total_damage(choices: Sequence[Choice], picked: Sequence[int]) -> float:
    """The damage that the picked settings do together."""
    return float(sum(choice.damage[i] for choice, i in zip(choices, picked, strict=True)))


def within_cost(choices: Sequence[Choice], limit: float) -> list[int]:
    """The settings of least damage that cost at most `limit`, or the cheapest if that is more."""
    return _bisect(choices, lambda picked: total_cost(choices, picked) <= limit, fewer_is_right=True)


def within_damage(choices: Sequence[Choice], limit: float) -> list[int]:
    """The cheapest settings that do at most `limit` of damage, or those of least damage if that is more."""
    return _bisect(choices, lambda picked: total_damage(choices, picked) <= limit, fewer_is_right=False)


def _bisect(choices: Sequence[Choice], fits: Callable[[list[int]], bool], fewer_is_right: bool) -> list[int]:
    """The settings at the lowest price (or the highest, if not `fewer_is_right`) that fit."""
    scale = max(float(np.ptp(c.damage)) for c in choices) / max(1.0, *(float(np.ptp(c.cost)) for c in choices))
    low, high = np.log(max(scale, 1e-30)) - 25, np.log(max(scale, 1e-30)) + 25
    right, wrong = (high, low) if fewer_is_right else (low, high)
    if fits(picked := cheapest(choices, float(np.exp(wrong)))):
        return picked
    for _ in range(_STEPS):
        middle = (right + wrong) / 2
        if fits(cheapest(choices, float(np.exp(middle)))):
            right = middle
        else:
            wrong = middle
    return cheapest(choices, float(np.exp(right)))


def greedy(choices: Sequence[Choice], limit: float, step: int = 1) -> list[int]:
    """A baseline in the manner of TEAL's search (2408.14690, algorithm 1): one part at a time goes `step` down.

    From everything kept, the part whose next setting adds the least damage takes it, whatever it saves, until the cost
    is `limit`. TEAL's steps save equal bytes each and stay within a block, whose joint error is measured anew after
    every one; here errors add up, over all parts of the model. `settings` must fall in cost.
    """
    picked = [0] * len(choices)
    while total_cost(choices, picked) > limit:
        candidates = [i for i, choice in enumerate(choices) if picked[i] + step < len(choice.cost)]
        if not candidates:
            break
        added = [float(choices[i].damage[picked[i] + step] - choices[i].damage[picked[i]]) for i in candidates]
        picked[candidates[int(np.argmin(added))]] += step
    return picked
