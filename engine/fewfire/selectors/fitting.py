"""What fitting a `Predictor` is, whatever it scores: the damage of leaving out, errors by density, filling it in.

The scores themselves come from `scores.py`, who is scored from `lowrank.py` and `router.py`. A fit holds, besides
densities, cuts and errors, what one layer adds to a `Predictor`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewfire.config import EXACT_ZEROS
from fewfire.observe import Layer
from fewfire.packed import Packed
from fewfire.quantize import decode, encode
from fewfire.selectors import threshold
from fewfire.selectors.fits import Fit, ffn_energy
from fewfire.selectors.scores import Linear, benefits, cuts
from fewfire.selectors.selection import Predictor

_SHARE = 0.3  # of neurons that are worth reading: the best single one for densities from 0.3 to 0.7
_FIRING = 0.7  # of those that fire at all, where many do not
_DENSITIES = (*threshold.DENSITIES[:-1], 0.95, 0.98, 1.0)  # scores have a long tail on the side of what is dropped


def damage(packed: Packed, layer: Layer) -> np.ndarray:
    """|what a neuron adds to the output|² over the token's energy, `(T, neurons)`."""
    found = layer.fired * threshold.down_weights(layer.tensors["down.weight"])
    found *= found
    found /= ffn_energy(packed, layer)[:, None]
    return found


def worth(packed: Packed, found: np.ndarray) -> np.ndarray:
    """What reading is worth, `(T, n)`, given the damage of leaving out: see `scores.benefits`."""
    exact = packed.config.hidden_act in EXACT_ZEROS
    return benefits(found, min(_SHARE, _FIRING * float((found > 0).mean())) if exact else _SHARE)


def stored(packed: Packed, scores: Linear) -> tuple[np.ndarray, Linear]:
    """The rows as they are stored, and the scores that they then give."""
    rows = encode(scores.rows, packed.formats.rows, "dot")
    return rows, Linear(decode(rows, packed.formats.rows, "dot", scores.rows.shape[1]), scores.bias)


def curve(packed: Packed, layer: Layer, scores: np.ndarray, members: np.ndarray, held: np.ndarray) -> Fit:
    """Cuts and errors by density, from the scores `(tokens of held, groups)` of tokens that nothing was fitted to."""
    every = -(-len(scores) // threshold.TOKENS)
    which, down = np.flatnonzero(held)[::every], layer.tensors["down.weight"]
    fired, per, found = layer.fired[which], ffn_energy(packed, layer)[which], cuts(scores, _DENSITIES)
    errors = [threshold.left_out(fired, spread(scores[::every] > cut, members), down, per) for cut in found]
    densities = np.array(_DENSITIES)
    # More that is read helps on average, but not always by a measurement.
    return {"densities": densities, "cuts": found, "errors": np.minimum.accumulate(errors)}


def spread(kept: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The neurons of the groups that are kept, bool `(T, neurons)`; `kept`: `(T, groups)`."""
    size = -(-len(members) // kept.shape[1])
    mask = np.empty((len(kept), len(members)), bool)
    mask[:, members] = np.repeat(kept, size, axis=1)[:, : len(members)]
    return mask


def fill(packed: Packed, fits: Sequence[Fit], densities: Sequence[float]) -> Predictor:
    """The predictor that keeps the given share in each layer. Raises `ValueError` for less than was measured."""
    bias = [fit["bias"] - np.float32(_cut(fit, density)) for fit, density in zip(fits, densities, strict=True)]
    basis = np.stack([fit["basis"] for fit in fits]) if "basis" in fits[0] else None
    rows, members = np.stack([fit["rows"] for fit in fits]), np.stack([fit["members"] for fit in fits])
    return Predictor(rows, np.stack(bias), members, basis)


def _cut(fit: Fit, density: float) -> float:
    """What scores have to be over, between the measured densities by linear interpolation."""
    threshold.check_density(density)
    if density < fit["densities"][0]:
        raise ValueError(f"density must be at least {fit['densities'][0]:g}, the least that was measured")
    if density >= 1:
        return -np.inf
    return float(np.interp(density, fit["densities"], fit["cuts"]))
