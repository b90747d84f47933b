"""The densities that each part of a model may choose from, with what a token costs then and the damage done.

A layer's FFN is one part, with a density for each of a method's kinds in it; its attention has two, what comes before
and what comes after; the output head is one. `spread.py` chooses. Costs are the bytes of the rows that a method may
leave out, and of what it reads in addition: predictors, screens, thresholds. Bytes and not time: prices of time that
were measured kind by kind scattered by more than they differ (perf/LOG.md, "what rows out of order cost, by density").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fewfire.packed import Packed
from fewfire.quantize import row_bytes
from fewfire.selectors.fits import Fit
from fewfire.selectors.methods import KINDS
from fewfire.selectors.selection import COLUMNS, column_shape
from fewfire.spread import Choice

_GRID = np.round(np.arange(0.05, 1.001, 0.025), 3)  # densities to choose from
_COARSE = _GRID[::2]  # of a part that has three kinds or more
_HEAD = 60  # densities of the head, which is the only one that a hundredth may be enough for
_NUMBER = 4  # bytes of a threshold

#: What matrices each field of a selection leaves rows of out.
_GOVERNS: dict[str, tuple[str, ...]] = {
    "down": ("down",),
    "gate": ("up", "down"),
    "top": ("up", "down"),
    "predictor": ("gate", "up", "down"),
    "ffn": ("gate", "up"),
    "qkv": ("qkv",),
    "o": ("o",),
    "screen": ("head",),
}
#: Those that test neurons, one after the other.
_TESTS = ("predictor", "top", "gate", "down")


def governed_bytes(packed: Packed, kinds: Sequence[str]) -> int:
    """Bytes of all rows that these kinds may leave out: what their density is a share of."""
    size = _matrices(packed)
    return sum(
        size[name] * (1 if name == "head" else packed.config.num_hidden_layers)
        for name in {name for kind in kinds for name in _GOVERNS[KINDS[kind].field]}
    )


def _firing(fits: Iterable[Fit]) -> float:
    """The share of neurons of a layer that are not exactly zero, which no method reads the rows of."""
    return min((float(fit["firing"]) for fit in fits if "firing" in fit), default=1.0)


def choices(
    packed: Packed,
    fits: Mapping[str, Sequence[Fit]],
    weights: Mapping[str, Sequence[float]],
) -> list[Choice]:
    """One choice for each part that the kinds decide about, in the order of the layers; settings are densities by kind.

    fits: by kind and layer (the head is one layer); weights: damage done by an error of 1, by kind and layer.
    Only settings that no other one is better than are there, in falling order of cost: from everything kept on.
    """
    found = []
    for part in dict.fromkeys(KINDS[kind].part for kind in fits):
        inside = [kind for kind in fits if KINDS[kind].part == part]
        added = {KINDS[kind].field: added_bytes(packed, kind, fits[kind]) for kind in inside}
        for layer in range(len(fits[inside[0]])):
            here = {kind: fits[kind][layer] for kind in inside}
            grids = dict(zip(here, np.meshgrid(*_axes(part, here), indexing="ij"), strict=True))
            damage = _joint({KINDS[k].field: weights[k][layer] * np.interp(d, here[k]["densities"], here[k]["errors"])
                             for k, d in grids.items()})  # fmt: skip
            asked = {KINDS[kind].field: density for kind, density in grids.items()}
            cost = _cost(packed, asked, added, _firing(here.values()))
            found.append(_front(cost.reshape(-1), damage.reshape(-1), grids))
    return found


def _joint(damages: Mapping[str, np.ndarray]) -> np.ndarray:
    """What is done by all kinds of a part together, by field.

    Tests of the same neurons drop some twice, so of all but the one that does most half is done already: within 15 %
    on SmolLM2-135M, where their sum is up to a third too much (perf/LOG.md, "what two tests drop").
    """
    tests = [damage for field, damage in damages.items() if field in _TESTS]
    others: Any = sum(damage for field, damage in damages.items() if field not in _TESTS)
    return others + (np.sum(tests, axis=0) + np.max(tests, axis=0)) / 2 if tests else others


def _axes(part: str, fits: Mapping[str, Fit]) -> list[np.ndarray]:
    """The densities of each kind, rising, as far as they were measured."""
    if part == "head":  # from the largest that was measured on, a screen keeps everything
        measured = [fit["densities"] for fit in fits.values()]
        return [np.append(np.geomspace(each[0], each[-2], _HEAD) if len(each) > 1 else [], 1.0) for each in measured]
    least = [float(fit["densities"][0]) for fit in fits.values()]
    grid = _GRID if len(fits) < 3 else _COARSE
    return [np.append(grid[(grid >= each) & (grid < 1)], 1.0) for each in least]


def _front(cost: np.ndarray, damage: np.ndarray, densities: Mapping[str, np.ndarray]) -> Choice:
    """The settings than which none costs less and does as little damage."""
    order = np.lexsort((damage, cost))
    least = np.minimum.accumulate(np.append(np.inf, damage[order][:-1]))
    chosen = order[damage[order] < least][::-1]
    columns = {kind: each.reshape(-1)[chosen].tolist() for kind, each in densities.items()}
    settings = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Choice(cost[chosen].astype(float), damage[chosen].astype(float), settings)


def _cost(packed: Packed, densities: Mapping[str, np.ndarray], added: Mapping[str, float], firing: float) -> np.ndarray:
    """Bytes of a layer, or the head, at densities by field, of all that these fields decide about."""
    size, column, every = _matrices(packed), _columns(packed), np.ones(())
    predicted = densities.get("predictor", every)
    # At most so many pass two tests: they look for the same neurons, though not for quite the same.
    tests = [densities.get(field, every) for field in ("predictor", "gate", "top")]
    fired = np.minimum.reduce(np.broadcast_arrays(*tests, np.array(firing)))
    share = {"gate": predicted, "up": fired, "down": np.minimum(fired, densities.get("down", every))}
    if "screen" in densities:
        share["head"] = densities["screen"]
    found = np.zeros(np.broadcast_shapes(*(each.shape for each in densities.values())))
    for name in {name for field in densities for name in _GOVERNS[field]}:
        found = found + size[name] * share.get(name, every)
    for field in column.keys() & densities.keys():
        rows, density = sum(size[name] for name in _GOVERNS[field]), densities[field]
        found = found + np.where(density < 1, column[field] * density - rows, 0)  # rows are read when all are
    for field, more in added.items():
        found = found + np.where(densities[field] < 1, more, 0)
    return found


def _matrices(packed: Packed) -> dict[str, int]:
    """Bytes of each matrix of a layer, and of the head."""
    c, of, arrays = packed.config, packed.formats, packed.arrays
    row = row_bytes(of.rows, c.hidden_size)
    return {
        "qkv": arrays["qkv"].nbytes // c.num_hidden_layers,
        "o": arrays["o"].nbytes // c.num_hidden_layers,
        "gate": c.intermediate_size * row,
        "up": c.intermediate_size * (row if c.gated else 0),
        "down": c.intermediate_size * row_bytes(of.down, c.hidden_size),
        "head": arrays.get("head", arrays["embed"]).nbytes,
    }


def _columns(packed: Packed) -> dict[str, int]:
    """Bytes of all columns of each projection that can be read by columns, in a layer."""
    c, down = packed.config, packed.formats.down
    queries = c.num_attention_heads * c.head_dim
    return {
        "qkv": c.hidden_size * row_bytes(down, queries + 2 * c.num_key_value_heads * c.head_dim),
        "o": queries * row_bytes(down, c.hidden_size),
        "ffn": c.hidden_size * row_bytes(down, c.intermediate_size * (2 if c.gated else 1)),
    }


def added_bytes(packed: Packed, kind: str, fits: Sequence[Fit]) -> float:
    """Bytes that a layer reads in addition wherever the kind leaves something out: what `traffic.py` counts."""
    field, c = KINDS[kind].field, packed.config
    if field in ("gate", "down"):
        return _NUMBER * c.intermediate_size
    if field in COLUMNS:
        return _NUMBER * column_shape(c, field)[0]
    if field == "top":
        return 0
    filled = KINDS[kind].fill(packed, fits, [float(fit["densities"][0]) for fit in fits])
    return sum(array.nbytes for array in vars(filled).values() if isinstance(array, np.ndarray)) / len(fits)
