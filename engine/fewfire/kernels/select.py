"""Select: which neurons of a layer one token needs, before their rows are read.

A chunk of the neurons begins with its part of the layer's list. A *predictor* scores them, or groups of them, and keeps
those whose score is over 0 (Deja Vu, 2310.17157; as sigmoid routers of groups: Learn To be Efficient, 2402.06126). Of
the rest the gates are computed, and those kept whose |act(gate)| exceeds their threshold (CATS, 2404.08763; for a ReLU
model and threshold 0 nothing is lost), or is among the layer's largest (The Lazy Neuron Phenomenon, 2210.06313). A
neuron that was read for a token shortly before may be kept whatever these say (ReLU Strikes Back, 2310.04564). A NaN is
always kept, so that it is seen in the end.
"""

from numba import types

from fewfire.kernels.axpy import BLOCK
from fewfire.kernels.compile import ZERO, inline, primitive
from fewfire.kernels.gather import SOON
from fewfire.kernels.layer import all_rows, pad, quantize
from fewfire.kernels.simd import ask, call, load_f32, load_i8, load_i32, store_f32, store_i8, store_i32
from fewfire.kernels.team import REGIONS, advance, finish, take, wait
from fewfire.kernels.work import A_LAYER, A_PHASE, THE_MODEL, THE_WORK

# Of a list, each group is read as four streams (see `gather.py`); its pieces are chunks. Fixed numbers, because they
# decide the order of additions.
_GROUPS, _PIECES = 4, 3
NEURON_CHUNKS = _GROUPS * _PIECES
_I = types.int64
_LARGEST_BITS = 0x7FFFFFFF  # of a float's absolute value, taken as an integer: they are in the same order


def longest_chunk(neurons: int, group_size: int) -> int:
    """Entries of the lists of a chunk, with those that kernels look ahead to."""
    groups = -(-neurons // group_size)
    return group_size * 4 * (-(-groups // (4 * NEURON_CHUNKS)) + 2) + 2 * BLOCK


@inline
def add_listed(target, bias, rows, count):
    """target[j] += bias[rows[j]]."""
    if bias != 0:
        for j in range(0, 4 * count, 4):
            store_f32(target + j, load_f32(target + j) + load_f32(bias + 4 * load_i32(rows + j)))


@primitive(*[_I] * 6, result=_I)
def keep(least, each, kept, ids, values, size):
    """Drops the entries whose |value| is not over their threshold and that are not `kept`; returns how many are left.

    Thresholds are `each` bytes apart, 0 if all neurons have the same.
    """
    left = ZERO
    for j in range(0, 4 * size, 4):
        number, value = load_i32(ids + j), load_f32(values + j)
        store_i32(ids + 4 * left, number)
        store_f32(values + 4 * left, value)
        passes = not abs(value) <= load_f32(least + each * number)
        if kept != 0 and not passes:
            passes = load_i8(kept + number) != 0
        left += passes
    return left


@inline
def keep_on(kept, ids, size):
    """The listed neurons are kept for the tokens to come."""
    if kept != 0:
        for j in range(0, 4 * size, 4):
            store_i8(kept + load_i32(ids + j), 1)


@inline
def _list_piece(listed, count, chunk, ids):
    """Copies a chunk of a list: of each quarter of its group a piece, one after the other; returns how many."""
    start, stop = count * (chunk // _PIECES) // _GROUPS, count * (chunk // _PIECES + 1) // _GROUPS
    quarter, piece, size = (stop - start + 3) // 4, chunk % _PIECES, ZERO
    begin, end = quarter * piece // _PIECES, quarter * (piece + 1) // _PIECES
    for part in range(start, start + 4 * quarter, max(quarter, 1)):  # a router has few groups, some chunks none
        for i in range(part + begin, min(part + end, stop)):
            store_i32(ids + 4 * size, load_i32(listed + 4 * i))
            size += 1
    return size


@inline
def _members(model, weights, kept, groups, scores, size, ids):
    """Lists the neurons of groups whose score and bias are over 0, and of others those that are `kept`."""
    found = ZERO
    for j in range(0, 4 * size, 4):
        group = load_i32(groups + j)
        passes = not load_f32(scores + j) + load_f32(weights.predictor_bias + 4 * group) <= 0
        first = group * weights.group_size
        for i in range(first, min(first + weights.group_size, model.neurons)):
            number = load_i32(weights.active + 4 * i)
            if passes or (kept != 0 and load_i8(kept + number) != 0):
                store_i32(ids + 4 * found, number)
                found += 1
    return found


@primitive(THE_MODEL, A_LAYER, THE_WORK, *[_I] * 5, result=_I)
def predict(model, weights, work, chunk, kept, ids, groups, scores):
    """Lists the neurons of a chunk that a predictor thinks will fire; returns how many. `groups`, `scores`: scratch."""
    size = _list_piece(model.every, weights.groups, chunk, groups)
    if size > 0:
        pad(groups, size)
        rows, soon, stride, end = groups, groups + 4 * SOON, weights.predictor_stride, (size + 3) // 4
        z = work.hint if weights.basis != 0 else work.x
        call(model.gather_dot, (weights.predictor, stride, rows, soon, stride, size, 0, end, z, scores))
        size = _members(model, weights, kept, groups, scores, size, ids)
    return size


@inline
def candidates(model, weights, work, chunk, kept, ids, groups, scores):
    """Lists the neurons of a chunk whose gates are to be computed; returns how many. `groups`, `scores`: scratch."""
    if weights.predictor != 0:
        return ask(model.predict, (model, weights, work, chunk, kept, ids, groups, scores))
    return _list_piece(weights.active, model.neurons, chunk, ids)


@inline
def gates(model, weights, x, ids, size, gate):
    """act(gate) of the listed neurons, less their centres."""
    pad(ids, size)
    stride, end = model.gate_stride, (size + 3) // 4
    call(model.gather_dot, (weights.gate, stride, ids, ids + 4 * SOON, stride, size, 0, end, x, gate))
    add_listed(gate, weights.gate_bias, ids, size)
    call(model.activate, (model.activation, gate, size, weights.act_centre, weights.act_threshold, ids, size))


@primitive(THE_MODEL, *A_PHASE, A_LAYER, THE_WORK, result=_I)
def reduce(model, team, phase, thread, weights, work):
    """The phase of a predictor's basis times x, which its rows meet. Returns the next phase."""
    chunks, matrix = team[REGIONS], (weights.basis, weights.basis_stride)
    while True:
        chunk = take(team, phase, thread, chunks)
        if chunk < 0:
            break
        all_rows(model, team, model.gather_dot, *matrix, weights.rank, chunk, chunks, work.x, work.hint_values)
        if finish(team, chunks):
            quantize(model.quantize, work.hint, ZERO)
            advance(team, phase)
    return wait(team, phase)


@primitive(THE_MODEL, *A_PHASE, A_LAYER, THE_WORK, result=_I)
def find_top(model, team, phase, thread, weights, work):
    """The phase that computes every gate and finds what the largest are over. Returns the next phase."""
    own = 4 * thread * work.longest
    ids, gate = work.ids + own, work.gate + own
    while True:
        chunk = take(team, phase, thread, NEURON_CHUNKS)
        if chunk < 0:
            break
        size = _list_piece(weights.active, model.neurons, chunk, ids)
        if size > 0:
            gates(model, weights, work.x, ids, size, gate)
        for j in range(0, 4 * size, 4):
            store_f32(work.gates + 4 * load_i32(ids + j), load_f32(gate + j))
        if finish(team, NEURON_CHUNKS):
            store_i32(work.least, _over_all_but(work.gates, model.neurons, weights.top))
            advance(team, phase)
    return wait(team, phase)


@inline
def _over_all_but(values, count, top):
    """The bits of the least number that at most `top` of the |values| are over. It takes 31 counts of them."""
    below, least = -ZERO - 1, ZERO + _LARGEST_BITS
    while least - below > 1:
        middle, over = (below + least) // 2, ZERO
        for i in range(0, 4 * count, 4):
            over += (load_i32(values + i) & _LARGEST_BITS) > middle
        if over > top:
            below = middle
        else:
            least = middle
    return least


@primitive(*[_I] * 10)
def leave_out(fired, tokens, neurons, gates, top, scores, groups, bias, members, group_size):
    """Zeroes the outputs of neurons that a token does not need, in a batch: `fired` (tokens, neurons).

    Kept are the `top` neurons with the largest `gates` (tokens, neurons), -1 for all; of the `groups` of neurons, those
    whose `scores` (tokens, groups) and `bias` are over 0 together; `members` lists the neurons group by group.
    """
    for t in range(tokens):
        own, gate, score = fired + 4 * t * neurons, gates + 4 * t * neurons, scores + 4 * t * groups
        if top >= 0:
            least = _over_all_but(gate, neurons, top)
            for i in range(0, 4 * neurons, 4):
                if (load_i32(gate + i) & _LARGEST_BITS) <= least:
                    store_f32(own + i, 0.0)
        for group in range(groups):
            if load_f32(score + 4 * group) + load_f32(bias + 4 * group) <= 0:
                first = group * group_size
                for i in range(first, min(first + group_size, neurons)):
                    store_f32(own + 4 * load_i32(members + 4 * i), 0.0)
