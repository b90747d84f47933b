"""A projection by columns: those whose input is small are not read (TEAL, 2408.14690).

The matrix is stored transposed, one row for each input, and what it makes of x is the sum of these rows, each times its
x. So a chunk is a share of the inputs: it lists those that exceed their thresholds and adds up their rows in a y of its
own; whoever finishes last adds up the chunks' ys in their order.
"""

import numpy as np
from numba import types

from fewfire.kernels.axpy import BLOCK
from fewfire.kernels.compile import inline, primitive
from fewfire.kernels.gather import VALUES
from fewfire.kernels.layer import add_to, begin_block, clear, pad
from fewfire.kernels.simd import (
    call,
    load_f32,
    load_f32x8,
    load_i64,
    store_f32,
    store_f32x8,
    store_i32,
    store_i64,
)
from fewfire.kernels.team import advance, finish, take, wait
from fewfire.kernels.work import A_LAYER, A_PHASE, THE_MODEL, THE_WORK

_I = types.int64
COLUMN_CHUNKS = 8  # a fixed number, because it decides the order of additions
# A chunk gets so many neighbouring inputs, then those COLUMN_CHUNKS runs further on: near enough to share pages, and no
# chunk gets all of an attention head whose outputs are large.
_RUN = 8
QKV, OUT, FFN = np.int64(0), np.int64(1), np.int64(2)  # the projections, in the order in which their counters lie


def longest_list(inputs: int) -> int:
    """Entries of the list of a chunk, with those that kernels look ahead to."""
    return -(-inputs // (_RUN * COLUMN_CHUNKS)) * _RUN + BLOCK + 1


@inline
def _count(work, layer, projection, chunk, size):
    store_i64(work.projected + 8 * ((3 * layer + projection) * COLUMN_CHUNKS + chunk), size)


@inline
def _list_over(values, least, inputs, chunk, ids, factors):
    """Lists the chunk's inputs whose |value| is over their threshold, and the values; returns how many.

    A NaN is listed, so that it is seen in the end.
    """
    size = 0
    for start in range(_RUN * chunk, inputs, _RUN * COLUMN_CHUNKS):
        for i in range(start, min(start + _RUN, inputs)):
            value = load_f32(values + 4 * i)
            store_i32(ids + 4 * size, i)
            store_f32(factors + 4 * size, value)
            size += not abs(value) <= load_f32(least + 4 * i)
    return size


@primitive(THE_MODEL, THE_WORK, *[_I] * 11)
def column_chunk(model, work, thread, layer, projection, chunk, columns, stride, least, x, inputs, outputs, out):
    """Adds up a chunk of the columns of a projection of x, and counts their bytes.

    Columns are `stride` bytes apart; `out` becomes the outputs (see `join_chunks`), with those that pad a column to
    whole groups.
    """
    width = (outputs + 63) // 64 * 64
    y = out if chunk == 0 else work.partial + 4 * (chunk - 1) * width
    ids, factors = work.ids + 4 * thread * work.longest, work.gate + 4 * thread * work.longest
    clear(y, width)
    size = _list_over(load_i64(x + VALUES), least, inputs, chunk, ids, factors)
    if size > 0:
        pad(ids, size)
        scratch = work.factors + thread * work.factors_stride
        begin_block(columns, stride, stride, ids, size)
        call(model.gather_axpy, (columns, stride, ids, ids + 4 * BLOCK, size, factors, y, width, scratch))
    _count(work, layer, projection, chunk, size * stride)


@primitive(THE_WORK, _I, _I)
def join_chunks(work, outputs, out):
    """out[:outputs] += what all chunks but the first have added up."""
    width = (outputs + 63) // 64 * 64
    for chunk in range(COLUMN_CHUNKS - 1):
        add_to(out, work.partial + 4 * chunk * width, outputs)


@inline
def _settle_gates(model, weights, work):
    """From all gate and up rows times x, in `work.gates`, to `work.gates` activated and `work.ups`, with the biases."""
    size, n = 4 * model.neurons, model.neurons
    if model.gated:
        for i in range(0, size, 32):  # apart, since `activate` overwrites what is behind
            store_f32x8(work.ups + i, load_f32x8(work.gates + size + i))
        add_to(work.ups, weights.up_bias, n)
        if model.act_on_up:
            call(model.activate, (model.activation, work.ups, n, 0, weights.act_threshold, model.every, n))
    add_to(work.gates, weights.gate_bias, n)
    own = weights.act_centre, weights.act_threshold, model.every
    call(model.activate, (model.activation, work.gates, n, *own, n))


@primitive(THE_MODEL, *A_PHASE, A_LAYER, THE_WORK, _I, result=_I)
def all_gates(model, team, phase, thread, weights, work, layer):
    """The phase of gate and up of all neurons, by columns. Returns the next phase."""
    outputs = model.neurons * (2 if model.gated else 1)
    while True:
        chunk = take(team, phase, thread, COLUMN_CHUNKS)
        if chunk < 0:
            break
        columns = weights.ffn_columns, model.ffn_column, weights.ffn_least, work.x, model.hidden, outputs, work.gates
        call(model.column_chunk, (model, work, thread, layer, FFN, chunk, *columns))
        if finish(team, COLUMN_CHUNKS):
            call(model.join_chunks, (work, outputs, work.gates))
            _settle_gates(model, weights, work)
            advance(team, phase)
    return wait(team, phase)
