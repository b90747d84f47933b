"""The methods by name: what each fits, and how its parts become a `Selection`.

A *kind* is a part of a selection that is fitted and has a density to choose, layer by layer, or once for the output
head; a *method* is one kind or several, and methods combine with "+". A new kind needs an entry in `KINDS`, and one in
`METHODS` under the name that people know. Knows nothing of how densities are chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fewfire.config import EXACT_ZEROS
from fewfire.observe import Layer
from fewfire.packed import Packed
from fewfire.selectors import lowrank, magnitude, router, screen, threshold, top
from fewfire.selectors.fits import Fit, ffn_energy
from fewfire.selectors.selection import Selection
from fewfire.selectors.threshold import Curve


class Kind(NamedTuple):
    """How to fit one kind of part, and what it decides about."""

    field: str  # of `Selection`
    part: str  # of the model: "ffn", "qkv", "o" or "head"
    fit: Callable[[Packed, Any], Fit]  # of a `Layer`; for the head of an `Observation` that has seen all layers
    fill: Callable[
        [Packed, Sequence[Fit], Sequence[float]], Any
    ]  # fits and densities by layer -> the selection's field
    probe: str | None  # the kind whose measured damage stands for this one's, since both change the same layer's same
    # output; None if the errors of a fit are nats of KL divergence already


def _down(packed: Packed, layer: Layer) -> Fit:
    return _curve(packed, layer, layer.fired, threshold.down_weights(layer.tensors["down.weight"]))


def _gate(packed: Packed, layer: Layer) -> Fit:
    return _curve(packed, layer, layer.gate, threshold.gate_weights(layer.up, layer.tensors["down.weight"]))


def _curve(packed: Packed, layer: Layer, values: np.ndarray, weights: np.ndarray) -> Fit:
    found = threshold.curve(values, weights, layer.fired, layer.tensors["down.weight"], ffn_energy(packed, layer))
    return dict(vars(found))


def _thresholds(packed: Packed, fits: Sequence[Fit], densities: Sequence[float]) -> np.ndarray:
    found = np.stack([Curve.of(fit).thresholds(d) for fit, d in zip(fits, densities, strict=True)])
    # Zeros are left out at every density: that costs nothing.
    return np.maximum(found, np.float32(0)) if packed.config.hidden_act in EXACT_ZEROS else found


def _top(packed: Packed, layer: Layer) -> Fit:
    errors = top.errors(layer.gate, layer.fired, layer.tensors["down.weight"], ffn_energy(packed, layer))
    return {"densities": np.array(threshold.DENSITIES), "errors": errors}


def _counts(packed: Packed, fits: Sequence[Fit], densities: Sequence[float]) -> np.ndarray:
    return top.fill(packed.config.intermediate_size, densities)


KINDS: dict[str, Kind] = {
    "down": Kind("down", "ffn", _down, _thresholds, "down"),
    "gate": Kind("gate", "ffn", _gate, _thresholds, "down"),
    "top": Kind("top", "ffn", _top, _counts, "down"),
    "lowrank": Kind("predictor", "ffn", lowrank.fit, lowrank.fill, "down"),
    "router": Kind("predictor", "ffn", router.fit, router.fill, "down"),
    "ffn": Kind("ffn", "ffn", magnitude.fit_ffn, magnitude.fill_ffn, "down"),
    "qkv": Kind("qkv", "qkv", magnitude.fit_qkv, magnitude.fill_qkv, "qkv"),
    "o": Kind("o", "o", magnitude.fit_o, magnitude.fill_o, "o"),
    "screen": Kind("screen", "head", screen.fit, screen.fill, None),
}
#: The kinds that a method consists of.
METHODS: dict[str, tuple[str, ...]] = {
    "down": ("down",),
    "gate": ("gate",),
    "topk": ("top",),
    "lowrank": ("lowrank",),
    "router": ("router",),
    "magnitude": ("qkv", "o", "ffn", "down"),
    "qkv": ("qkv",),
    "o": ("o",),
    "screen": ("screen",),
}
#: What is tried if no method is asked for. Each spares as many bytes as it can, and the clock decides between them:
#: more kinds read less, but not always in less time. What is not here, and why: perf/LOG.md, "budgets are spread by
#: time" and "down rows after gates".
_USUAL = ("gate+screen", "gate+down+o+screen")
_USUAL_ZEROS = ("screen", "lowrank+screen", "lowrank+o+screen")  # of models that leave out zeros already
_REUSE = re.compile(r"reuse-([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class Method:
    """What a name such as "gate+down+reuse-8" means."""

    name: str
    kinds: tuple[str, ...]
    window: int = 1  # tokens over which neurons stay kept, and others may join them


def parse(name: str) -> Method:
    """A method by its name. Raises `ValueError` for one that is not known and for what does not go together."""
    names = list(dict.fromkeys(part.strip() for part in name.split("+")))
    kinds, windows = list[str](), list[int]()
    for part in names:
        if part == "exact":
            raise ValueError("exact needs no calibration: ReLU models leave out zeros by themselves, others have none")
        if reuse := _REUSE.fullmatch(part):
            windows.append(int(reuse[1]))
        elif part in METHODS:
            kinds += METHODS[part]
        else:
            raise ValueError(f"unknown method {part!r}: choose from {known()}, or several joined with +")
    found = Method("+".join(names), tuple(dict.fromkeys(kinds)), *windows[:1])
    if why := _conflict(found.kinds, windows):
        raise ValueError(f"{found.name} does not go together: {why}")
    return found


def usual(packed: Packed) -> tuple[str, ...]:
    """The methods that are tried for a model if none is asked for."""
    return _USUAL_ZEROS if packed.config.hidden_act in EXACT_ZEROS else _USUAL


def known() -> str:
    """The names of all methods, for people."""
    return ", ".join([*METHODS, "reuse-8"])


def _conflict(kinds: Sequence[str], windows: Sequence[int]) -> str:
    """Why kinds cannot be combined; nothing if they can."""
    decided = [KINDS[kind].field for kind in kinds]
    neurons = set(decided) & {"gate", "down", "top", "predictor"}
    if decided.count("predictor") > 1:
        return "one predictor decides, not two"
    if {"predictor", "top"} <= set(decided):
        return "topk compares all neurons, and a predictor leaves some of them uncomputed"
    if "ffn" in decided and neurons - {"down"}:
        return "columns compute every gate and up, so that no neuron is left to drop before (qkv+o leave the FFN alone)"
    if len(windows) > 1 or 1 in windows:
        return "reuse-N is for one number of tokens, 2 or more"
    if windows and not neurons:
        return f"reuse-{windows[0]} keeps the neurons that a method such as gate has chosen, and there is none"
    return ""


def selection(
    packed: Packed, method: Method, fits: Mapping[str, Sequence[Fit]], densities: Mapping[str, Sequence[float]]
) -> Selection:
    """The selection that keeps, of each kind, the given share in each layer; a kind that keeps all is not in it."""
    some = {kind: shares for kind, shares in densities.items() if min(shares) < 1}
    parts: dict[str, Any] = {KINDS[k].field: KINDS[k].fill(packed, fits[k], d) for k, d in some.items()}
    return Selection(method.name, window=method.window, **parts)


def missed(fits: Mapping[str, Sequence[Fit]], densities: Mapping[str, Sequence[float]]) -> float | None:
    """An upper bound (95 %) on the share of tokens whose most probable next token a screen misses, None without one.

    On text like the sample; it is that of the next smaller margin that was measured.
    """
    for kind, found in fits.items():
        if KINDS[kind].part == "head":
            place = int(np.searchsorted(found[0]["densities"], densities[kind][0], side="right")) - 1
            return float(found[0]["missed"][max(place, 0)])
    return None
