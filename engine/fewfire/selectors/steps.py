"""The steps of the kernels that only models with a selection need, or with exact zeros.

They are primitives, and compiled when they are first asked for: a first start waits for none that it does not use.
"""

from __future__ import annotations

import numpy as np

from fewfire.kernels import codes, columns, head, neurons, select
from fewfire.kernels.compile import Primitive

# By their fields in the model's record, with the fields of a layer's record that they are called for.
_OF_LAYERS = {
    "keep": (select.keep, ("gate_least", "down_least", "top")),
    "scatter_kept": (neurons.scatter_kept, ("down_least",)),
    "find_top": (select.find_top, ("top",)),
    "predict": (select.predict, ("predictor",)),
    "reduce": (select.reduce, ("basis",)),
    "column_chunk": (columns.column_chunk, ("qkv_columns", "o_columns", "ffn_columns")),
    "join_chunks": (columns.join_chunks, ("qkv_columns", "o_columns", "ffn_columns")),
    "all_gates": (columns.all_gates, ("ffn_columns",)),
}


def steps(layers: np.ndarray, screened: bool, trained: bool) -> dict[str, Primitive]:
    """What is called for these layers' records, by the fields in the model's record.

    `screened`: the head has a screen; `trained`: the model was trained with its selection, so that prefill keeps to it.
    """
    unused = {"top": -1}
    used = {name for name in layers.dtype.names or () if (layers[name] != unused.get(name, 0)).any()}
    found = {name: primitive for name, (primitive, fields) in _OF_LAYERS.items() if used.intersection(fields)}
    if screened:
        found["screened_logits"] = head.screened_logits
        found["dot_codes"] = codes.dot_codes
    if trained:
        found["leave_out"] = select.leave_out
    return found
