"""What a calibration has chosen, in the form that the engine reads: thresholds, and weights of predictors.

A neuron is read if it passes everything that is set here, in this order: `predictor` or `top`, then `gate`, then
`down`. Every part says with a threshold what is dropped; -1 drops nothing, so that a layer can stay dense. Weights are
stored rows (`quantize.py`) in the model's own formats: `rows` of the model where they are multiplied with a vector,
`down` where they are added up. Thresholds are per neuron or input, because these differ in what they matter to the
output; a method that has one for a layer repeats it.

With a `window` a neuron is read as well if a token before it in the window read it: what is kept grows by union, the
aggregated sparsity of ReLU Strikes Back (2310.04564). That adds to what a token selects and never restricts it; rows
that several tokens share are in the caches by then, and thresholds may be higher for the same density, since that
counts all that is read. The paper's tokens that load nothing new at all would have to do without neurons that they
select, to spare a transfer from slow memory that there is none of here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fewfire.config import ModelConfig


@dataclass(frozen=True, eq=False)
class Predictor:
    """Guesses from the FFN's input which neurons will fire (`lowrank`), or which groups of them (`router`).

    A group's score is its row of `rows` times z, where z = basis x, or x itself without a basis. It is kept if its
    score plus its bias is over 0; a bias of +inf keeps it always. `members` lists the neurons group by group; all
    groups but the last, which may be smaller, have ceil(neurons / groups).
    """

    rows: np.ndarray  # (layers, groups, bytes of a row of `rank` or `hidden` columns) uint8
    bias: np.ndarray  # (layers, groups) float32
    members: np.ndarray  # (layers, neurons) int32
    basis: np.ndarray | None = None  # (layers, rank, bytes of a row of `hidden` columns) uint8

    @property
    def group_size(self) -> int:
        """Neurons of a group."""
        return -(-self.members.shape[1] // self.bias.shape[1])


@dataclass(frozen=True, eq=False)
class Columns:
    """A projection by columns: those whose input's absolute value is not over its threshold are not read.

    The stored rows are the columns of the projection, in the layout and format of down rows; kernels may read up to 63
    bytes behind the last. Where all thresholds of a layer are -1, the projection is read by rows.
    """

    columns: np.ndarray  # (layers, inputs, bytes of a row of `outputs` columns) uint8
    thresholds: np.ndarray  # (layers, inputs) float32


COLUMNS = ("qkv", "o", "ffn")  # the parts of a selection that are columns


def column_shape(config: ModelConfig, part: str) -> tuple[int, int]:
    """Inputs and outputs of the projection that `Selection.qkv`, `.o` or `.ffn` is."""
    heads, hidden = config.num_attention_heads * config.head_dim, config.hidden_size
    return {
        "qkv": (hidden, heads + 2 * config.num_key_value_heads * config.head_dim),
        "o": (heads, hidden),
        "ffn": (hidden, config.intermediate_size * (2 if config.gated else 1)),
    }[part]


@dataclass(frozen=True, eq=False)
class Screen:
    """The output head in few bits: tokens to which it gives exp(-margin) or more get their exact logit.

    The others keep the screened one: rows (basis x) + bias + centre x, where the rows are `codes` with their `scales`
    (`codes.py`); `basis` and `centre`, in the format of the model's tables, meet the final hidden state.
    """

    codes: np.ndarray  # (vocab, bytes of a row of `rank` columns) uint8
    scales: np.ndarray  # (vocab,) float32
    basis: np.ndarray  # (rank, bytes of a row of `hidden` columns) uint8
    centre: np.ndarray  # (1, bytes of a row of `hidden` columns) uint8
    rank: int
    bias: np.ndarray  # (vocab,) float32
    margin: float


@dataclass(frozen=True, eq=False)
class Selection:
    """All that is left out, and how it is chosen."""

    method: str  # for people: "gate", "lowrank + gate + screen"
    gate: np.ndarray | None = None  # (layers, neurons) float32: drops neurons whose |act(gate)| is not over it
    down: np.ndarray | None = None  # (layers, neurons) float32: drops down rows whose |act(gate) * up| is not over it
    top: np.ndarray | None = None  # (layers,) int32: keeps the so many neurons with the largest |act(gate)|
    predictor: Predictor | None = None
    qkv: Columns | None = None
    o: Columns | None = None
    ffn: Columns | None = None  # outputs: all gate rows, then all up rows where the model has them
    window: int = 1  # tokens (positions from a multiple of it on) over which neurons that were read stay kept
    screen: Screen | None = None
    trained: bool = False  # the model was trained with it: prefill leaves out the same, too
