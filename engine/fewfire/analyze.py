"""Emergent sparsity: how few of a model's neurons matter to a token, layer by layer, and how well they are predicted.

In the manner of The Lazy Neuron Phenomenon (2210.06313: how many activations are zero, by depth and by token) and of
ReLU Strikes Back (2310.04564: how many neurons several tokens in a row use together). Their models have a ReLU, and
neurons are active or zero. Other activation functions make nothing exactly zero; there *active* means the neurons with
the largest abs(h) that hold 90 % of the token's energy, the sum of h^2. Everything is measured on the packed model's
own weights, in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fewfire import sparsity
from fewfire.config import EXACT_ZEROS
from fewfire.observe import Layer, Observation
from fewfire.packed import Packed
from fewfire.progress import Progress, silent
from fewfire.selectors.predicted import predicted
from fewfire.selectors.selection import Selection

SHARES = (0.5, 0.9, 0.99)  # of a token's energy
ACTIVE = 0.9  # the share that makes neurons active where none is exactly zero
SMALL = 0.01  # of the token's largest activation
POINTS = 100  # of the energy curves
MAGNITUDES = np.linspace(-6, 0, 61)  # edges of the bins of log10(abs(h) / the token's largest)


@dataclass(frozen=True)
class LayerSparsity:
    """One layer's figures; all are shares from 0 to 1, of its neurons unless something else is said."""

    number: int
    gate_zeros: float  # act(gate) is exactly 0: neither the up nor the down row is needed
    zeros: float  # h is exactly 0: the down row is not needed
    small: float  # abs(h) under `SMALL` of the token's largest
    energy: tuple[float, ...]  # neurons that hold each of `SHARES` of the token's sum of h^2, mean over tokens
    output_energy: tuple[float, ...]  # the same of h^2 * ||down||^2, which is what reaches the output
    active: float  # mean over tokens
    never: float  # active for no token of the sample
    often: float  # active for at least half of the tokens
    kept: float  # of a token's active neurons, those that were active for the token before
    jaccard: float  # active for two tokens in a row, of those active for either
    aggregated: dict[int, float]  # active for any of t tokens in a row, by t
    by_position: dict[str, float]  # active, by the token's position in its window
    predictor: sparsity.Quality | None  # of the selection's predictor, None where there is none
    energy_curve: tuple[float, ...]  # share of the energy that the best 0 %, 1 %, ... 100 % of the neurons hold
    magnitudes: tuple[float, ...]  # share of activations in each bin of `MAGNITUDES`


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found."""

    model: str
    weights: str
    neurons: int  # per layer
    exact: bool  # the activation function makes exact zeros, and active means not zero
    tokens: int
    windows: int
    layers: tuple[LayerSparsity, ...]

    @property
    def meaning(self) -> str:
        """What is called an active neuron, in words."""
        return "h is not zero" if self.exact else f"the largest |h| that hold {ACTIVE:.0%} of the token's energy"

    def mean(self) -> LayerSparsity:
        """The mean over the layers of every figure; its number is -1."""
        rows = [asdict(layer) | {"number": -1} for layer in self.layers]
        return LayerSparsity(**{name: _mean([row[name] for row in rows]) for name in rows[0]})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with what the lists' places stand for."""
        axes = {
            "shares_of_energy": list(SHARES),
            "small_under": SMALL,
            "magnitude_edges": [round(float(edge), 6) for edge in MAGNITUDES],
        }
        mean = {name: value for name, value in asdict(self.mean()).items() if name != "number"}
        return asdict(self) | {"active_means": self.meaning, "axes": axes, "mean": mean}


def analyze(
    packed: Packed,
    windows: Sequence[Sequence[int]],
    progress: Progress = silent,
    selection: Selection | None = None,
) -> Analysis:
    """Measures every layer over windows of tokens, each read from an empty cache, with every neuron computed.

    If the selection has a predictor, it is judged by the neurons that the selection's thresholds would keep after an
    exact computation, or by the active ones if it has no thresholds. Raises `ValueError` for windows that an
    `Observation` refuses, or if none has two tokens.
    """
    lengths = [len(window) for window in windows]
    if max(lengths, default=0) < 2:
        raise ValueError("there is nothing to compare: a window needs two tokens")
    exact = packed.config.hidden_act in EXACT_ZEROS
    layers = tuple(
        measure(layer, lengths, exact, *_judged(packed, selection, layer))
        for layer in Observation(packed, windows, progress)
    )
    return Analysis(
        model=packed.name,
        weights=packed.weights,
        neurons=packed.config.intermediate_size,
        exact=exact,
        tokens=sum(lengths),
        windows=len(lengths),
        layers=layers,
    )


def measure(
    layer: Layer,
    lengths: Sequence[int],
    exact: bool,
    predicted: np.ndarray | None = None,
    wanted: np.ndarray | None = None,
) -> LayerSparsity:
    """One layer's figures; `lengths` are the windows', `exact` says that active means not zero.

    predicted, wanted: what a predictor keeps and what it should keep, masks `(T, neurons)`; it should keep the active
    neurons if nothing else is said.
    """
    fired = layer.fired
    energy = fired * fired
    ranks = sparsity.Ranks(energy)
    down = layer.tensors["down.weight"]  # (hidden, neurons)
    output = sparsity.Ranks(energy * (down * down).sum(axis=0))
    active = fired != 0 if exact else ranks.holding(ACTIVE)
    wanted = active if wanted is None else wanted
    frequency, overlap = active.mean(axis=0), sparsity.overlap(active, lengths)
    return LayerSparsity(
        number=layer.number,
        gate_zeros=float((layer.gate == 0).mean()),
        zeros=float((fired == 0).mean()),
        small=sparsity.small_share(fired, SMALL),
        energy=tuple(float(ranks.holders(share).mean()) / fired.shape[1] for share in SHARES),
        output_energy=tuple(float(output.holders(share).mean()) / fired.shape[1] for share in SHARES),
        active=float(active.mean()),
        never=float((frequency == 0).mean()),
        often=float((frequency >= 0.5).mean()),
        kept=overlap.kept,
        jaccard=overlap.jaccard,
        aggregated=sparsity.aggregated(active, lengths),
        by_position=sparsity.by_position(active, lengths),
        predictor=None if predicted is None else sparsity.predictor_quality(wanted, predicted),
        energy_curve=tuple(ranks.curve(POINTS).tolist()),
        magnitudes=tuple(sparsity.magnitudes(fired, MAGNITUDES).tolist()),
    )


def _judged(packed: Packed, selection: Selection | None, layer: Layer) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What the selection's predictor keeps, and what its thresholds keep of all neurons; None for what it has not."""
    if selection is None or selection.predictor is None:
        return None, None
    limits = [(selection.gate, layer.gate), (selection.down, layer.fired)]
    kept = [np.abs(values) > limit[layer.number] for limit, values in limits if limit is not None]
    return predicted(selection.predictor, packed.formats, layer), np.logical_and.reduce(kept) if kept else None


def _mean(values: list[Any]) -> Any:
    """The mean of numbers, or of tuples or dictionaries of them, place by place."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        means = [_mean(list(column)) for column in zip(*values, strict=True)]
        return sparsity.Quality(*means) if isinstance(first, sparsity.Quality) else tuple(means)
    return first if first is None or isinstance(first, int) else float(np.mean(values))
