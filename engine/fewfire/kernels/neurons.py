"""The feed-forward block of one token: select, gather and scatter for one chunk of the neurons.

A chunk begins with a part of the layer's list of candidates. *Select* drops those whose |act(gate)| does not exceed
their threshold (CATS, 2404.08763; for a ReLU model and threshold 0 nothing is lost). *Gather* computes the up rows of
the others, *scatter* adds their down rows into the chunk's own y, if there are thresholds for them only of those whose
|act(gate) * up| exceeds theirs (TEAL, 2408.14690). Whatever is dropped is not read.
"""

from fewfire.kernels.axpy import BLOCK
from fewfire.kernels.compile import inline
from fewfire.kernels.gather import SOON
from fewfire.kernels.layer import multiply_by
from fewfire.kernels.simd import call, load_f32, load_i32, splat_f32, store_f32, store_f32x8, store_i32, store_i64

# Of the list of candidates, each group is read as four streams (see `gather.py`); its pieces are chunks. Fixed numbers,
# because they decide the order of additions.
_GROUPS, _PIECES = 4, 4
NEURON_CHUNKS = _GROUPS * _PIECES
_STEP = BLOCK // 4  # of each quarter of a list, neurons that are scattered together


def longest_chunk(neurons: int) -> int:
    """Entries of the lists of a chunk, with those that kernels look ahead to."""
    return 4 * (-(-neurons // (4 * NEURON_CHUNKS)) + 2) + 2 * BLOCK


@inline
def _list_piece(listed, count, begin, end, ids):
    """Copies entries begin to end of each quarter of a list, one quarter after the other; returns how many."""
    quarter, size = (count + 3) // 4, 0
    for part in range(0, 4 * quarter, quarter):
        for i in range(part + begin, min(part + end, count)):
            store_i32(ids + 4 * size, load_i32(listed + 4 * i))
            size += 1
    return size


@inline
def _pad(ids, size):
    """What kernels look ahead to behind a list: its last entry."""
    for i in range(size, size + BLOCK):
        store_i32(ids + 4 * i, load_i32(ids + 4 * size - 4))


@inline
def _add_listed(target, bias, rows, count):
    """target[j] += bias[rows[j]]."""
    if bias != 0:
        for j in range(0, 4 * count, 4):
            store_f32(target + j, load_f32(target + j) + load_f32(bias + 4 * load_i32(rows + j)))


@inline
def _keep(least, ids, values, size):
    """Drops the entries whose |value| is not over their neuron's threshold; returns how many are left.

    A NaN stays, so that it is seen in the end.
    """
    if least == 0:
        return size
    kept = 0
    for j in range(0, 4 * size, 4):
        number, value = load_i32(ids + j), load_f32(values + j)
        store_i32(ids + 4 * kept, number)
        store_f32(values + 4 * kept, value)
        kept += not abs(value) <= load_f32(least + 4 * number)
    return kept


@inline
def _pick(values, rows, count, out):
    """out[j] = values[rows[j]]."""
    for j in range(0, 4 * count, 4):
        store_f32(out + j, load_f32(values + 4 * load_i32(rows + j)))


@inline
def _meets_up(model, weights):
    """Whether up rows are read, and not given by the columns of the whole projection (see `columns.py`)."""
    return model.gated != 0 and weights.ffn_columns == 0


@inline
def _fire(model, weights, rows, count, gate, up):
    """gate *= up, for the neurons that `rows` lists, once the up rows have met x."""
    _add_listed(up, weights.up_bias, rows, count)
    if model.act_on_up:
        call(model.activate, (model.activation, model.act_threshold, up, count))
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
    for start in range(0, (count + 3) // 4, _STEP):
        if _meets_up(model, weights):
            end, later = min(start + _STEP, (count + 3) // 4), ids + 4 * _STEP
            call(model.gather_dot, (weights.updown, stride, ids, later, down, count, start, end, x, up))
        size = _fill_block(ids, gate, up, count, start, rows, soon, fired, met)
        if _meets_up(model, weights):
            _fire(model, weights, rows, size, fired, met)
        call(model.gather_axpy, (weights.updown + down, stride, rows, soon, size, fired, y, model.width, scratch))


@inline
def _scatter_kept(model, weights, ids, gate, up, count, x, y, scratch):
    """The same of those neurons alone whose |act(gate) * up| is over their threshold; returns how many."""
    stride, down = model.updown_stride, model.down
    if _meets_up(model, weights):
        call(model.gather_dot, (weights.updown, stride, ids, ids + 4 * SOON, down, count, 0, (count + 3) // 4, x, up))
        _fire(model, weights, ids, count, gate, up)
    kept = _keep(weights.down_least, ids, gate, count)
    if kept > 0:
        _pad(ids, kept)
        call(
            model.gather_axpy,
            (weights.updown + down, stride, ids, ids + 4 * BLOCK, kept, gate, y, model.width, scratch),
        )
    return kept


@inline
def neuron_chunk(model, weights, work, layer, thread, chunk):
    """Adds up a chunk of a layer's neurons in the chunk's part of `work.partial`, and counts those that it read."""
    start, stop = model.neurons * (chunk // _PIECES) // _GROUPS, model.neurons * (chunk // _PIECES + 1) // _GROUPS
    quarter, piece = (stop - start + 3) // 4, chunk % _PIECES
    begin, end = quarter * piece // _PIECES, quarter * (piece + 1) // _PIECES
    y, scratch, own = work.partial + 4 * chunk * model.width, work.factors + thread * work.factors_stride, 4 * thread
    ids, gate, up = work.ids + own * work.longest, work.gate + own * work.longest, work.up + own * work.longest
    block = work.block + 4 * own * BLOCK
    for i in range(0, 4 * model.width, 32):
        store_f32x8(y + i, splat_f32(0.0))
    size = _list_piece(weights.active + 4 * start, stop - start, begin, end, ids)
    if size > 0:
        _pad(ids, size)
        if weights.ffn_columns != 0:
            _pick(work.gates, ids, size, gate)
        else:
            stride, end = model.gate_stride, (size + 3) // 4
            call(model.gather_dot, (weights.gate, stride, ids, ids + 4 * SOON, stride, size, 0, end, work.x, gate))
            _add_listed(gate, weights.gate_bias, ids, size)
            call(model.activate, (model.activation, model.act_threshold, gate, size))
        size = _keep(weights.gate_least, ids, gate, size)
    kept = size
    if size > 0:
        _pad(ids, size)
        if weights.ffn_columns != 0 and model.gated != 0:
            _pick(work.ups, ids, size, up)
            multiply_by(gate, up, size)
        if weights.down_least != 0:
            kept = _scatter_kept(model, weights, ids, gate, up, size, work.x, y, scratch)
        else:
            _scatter(model, weights, ids, gate, up, size, work.x, block, y, scratch)
    read = work.read + 16 * (layer * NEURON_CHUNKS + chunk)
    store_i64(read, size if weights.ffn_columns == 0 else 0)
    store_i64(read + 8, kept)
