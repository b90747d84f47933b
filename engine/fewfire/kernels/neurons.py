"""The feed-forward block of one token: select, gather and scatter for one chunk of the neurons.

*Select* (`select.py`) lists the neurons that matter. *Gather* computes their up rows, *scatter* adds their down rows
into the chunk's own y, if there are thresholds for them only of those whose |act(gate) * up| exceeds theirs (TEAL,
2408.14690). Whatever is dropped is not read. Where activations have centres, chunks of the bypass come beside these.
"""

from numba import types

from fewfire.kernels.axpy import BLOCK
from fewfire.kernels.compile import inline, primitive
from fewfire.kernels.gather import SOON, begin_streams
from fewfire.kernels.layer import begin_block, clear, multiply_by, pad
from fewfire.kernels.select import NEURON_CHUNKS, add_listed, candidates, gates, keep_on
from fewfire.kernels.simd import ask, call, load_f32, load_i32, store_f32, store_i32, store_i64
from fewfire.kernels.work import A_LAYER, THE_MODEL

BYPASS_CHUNKS = 4  # few, since streams begin anew with each that another thread takes
_STEP = BLOCK // 4  # of each quarter of a list, neurons that are scattered together


@inline
def _listed(values, ids, size, out):
    """out[j] = values[ids[j]]."""
    for j in range(0, 4 * size, 4):
        store_f32(out + j, load_f32(values + 4 * load_i32(ids + j)))


@inline
def _meets_up(model, weights):
    """Whether up rows are read, and not given by the columns of the whole projection (see `columns.py`)."""
    return model.gated != 0 and weights.ffn_columns == 0


@inline
def _fire(model, weights, rows, count, gate, up):
    """gate *= up, for the neurons that `rows` lists, once the up rows have met x."""
    add_listed(up, weights.up_bias, rows, count)
    if model.act_on_up:
        call(model.activate, (model.activation, up, count, 0, weights.act_threshold, rows, count))
    multiply_by(gate, up, count)


@inline
def _fill_block(ids, gate, up, count, start, rows, soon, fired, met):
    """Of each quarter of a list, the next `_STEP` entries: rows, those to ask for, act(gate) and up; how many."""
    quarter, size = (count + 3) // 4, 0
    for part in range(0, 4 * quarter, quarter):
        for i in range(part + start, part + min(start + _STEP, quarter)):
            if i < count:
                store_i32(rows + 4 * size, load_i32(ids + 4 * i))
                store_i32(soon + 4 * size, load_i32(ids + 4 * i + 4 * _STEP))
                store_f32(fired + 4 * size, load_f32(gate + 4 * i))
                store_f32(met + 4 * size, load_f32(up + 4 * i))
                size += 1
    return size


@inline
def _scatter(model, weights, ids, gate, up, count, x, block, y, scratch):
    """y += the down rows of the listed neurons, each times its act(gate) * up."""
    stride, down = model.updown_stride, model.down
    rows, soon, fired, met = block, block + 4 * BLOCK, block + 8 * BLOCK, block + 12 * BLOCK
    begin_streams(weights.updown + down, stride, stride - down, ids, count)
    for start in range(0, (count + 3) // 4, _STEP):
        if _meets_up(model, weights):
            end, later = min(start + _STEP, (count + 3) // 4), ids + 4 * _STEP
            call(model.gather_dot, (weights.updown, stride, ids, later, down, count, start, end, x, up))
        size = _fill_block(ids, gate, up, count, start, rows, soon, fired, met)
        if _meets_up(model, weights):
            _fire(model, weights, rows, size, fired, met)
        call(model.gather_axpy, (weights.updown + down, stride, rows, soon, size, fired, y, model.width, scratch))


@primitive(THE_MODEL, A_LAYER, *[types.int64] * 8, result=types.int64)
def scatter_kept(model, weights, kept, ids, gate, up, count, x, y, scratch):
    """The same of those neurons alone whose |act(gate) * up| is over their threshold; returns how many."""
    stride, down = model.updown_stride, model.down
    if _meets_up(model, weights):
        call(model.gather_dot, (weights.updown, stride, ids, ids + 4 * SOON, down, count, 0, (count + 3) // 4, x, up))
        _fire(model, weights, ids, count, gate, up)
    left, later = ask(model.keep, (weights.down_least, 4, kept, ids, gate, count)), ids + 4 * BLOCK
    if left > 0:
        pad(ids, left)
        begin_block(weights.updown + down, stride, stride - down, ids, left)
        call(model.gather_axpy, (weights.updown + down, stride, ids, later, left, gate, y, model.width, scratch))
    return left


@inline
def bypass_chunk(model, weights, chunk, x, out):
    """A chunk of the rows of bypass times x: a piece of each quarter of them (see `gather.py`)."""
    rows, stride, quarter = model.every, model.table_stride, (model.hidden + 3) // 4
    piece = quarter * chunk // BYPASS_CHUNKS, quarter * (chunk + 1) // BYPASS_CHUNKS
    call(model.table_dot, (weights.bypass, stride, rows, rows + 4 * SOON, stride, model.hidden, *piece, x, out))


@inline
def neuron_chunk(model, weights, work, layer, thread, chunk, kept):
    """Adds up a chunk of a layer's neurons in the chunk's part of `work.partial`, and counts the rows that it read.

    `kept`: uint8, the layer's neurons that are read in any case, to which these are added; or 0.
    """
    y, scratch, own = work.partial + 4 * chunk * model.width, work.factors + thread * work.factors_stride, 4 * thread
    ids, gate, up = work.ids + own * work.longest, work.gate + own * work.longest, work.up + own * work.longest
    block = work.block + 4 * own * BLOCK
    clear(y, model.width)
    met = candidates(model, weights, work, chunk, kept, ids, up, gate)
    size = met
    if size > 0:
        if weights.top >= 0 or weights.ffn_columns != 0:
            _listed(work.gates, ids, size, gate)
        else:
            gates(model, weights, work.x, ids, size, gate)
        if weights.top >= 0:
            size = ask(model.keep, (work.least, 0, kept, ids, gate, size))
        if weights.gate_least != 0:
            size = ask(model.keep, (weights.gate_least, 4, kept, ids, gate, size))
    left = size
    if size > 0:
        pad(ids, size)
        if weights.ffn_columns != 0 and model.gated != 0:
            _listed(work.ups, ids, size, up)
            multiply_by(gate, up, size)
        if weights.down_least != 0:
            left = ask(model.scatter_kept, (model, weights, kept, ids, gate, up, size, work.x, y, scratch))
        else:
            _scatter(model, weights, ids, gate, up, size, work.x, block, y, scratch)
        keep_on(kept, ids, left)
    by_rows, read = weights.ffn_columns == 0, work.read + 24 * (layer * NEURON_CHUNKS + chunk)
    store_i64(read, met if by_rows else 0)
    store_i64(read + 8, size if by_rows else 0)
    store_i64(read + 16, left)
