"""One token through all layers, compiled as one function that every thread of a team runs.

A layer is four phases (see `team.py`): rows of q, k and v; attention, where a chunk is all queries of one cached head
over a range of positions; rows of o; neurons. The serial step that follows each is small and done by whoever finished
last. In the last phase a chunk of neurons goes through select, gather and scatter on its own: gate rows, activation, up
rows, and the scaled down rows into the chunk's own y; the chunks' sums are added in a fixed order, as are the ranges'
parts. So the result is the same bits for any number of threads.
"""

from numba import types

from fewfire.kernels.attention import RANGE
from fewfire.kernels.axpy import BLOCK
from fewfire.kernels.compile import inline, kernel, records
from fewfire.kernels.layer import (
    CACHE,
    LAYER,
    MODEL,
    add_block,
    add_to,
    attend_group,
    embed,
    first_seen,
    multiply_by,
    next_input,
    part_size,
    place_heads,
    quantize,
    record,
    set_rope,
)
from fewfire.kernels.simd import call, load_f32, load_i32, splat_f32, store_f32, store_f32x8, store_i32
from fewfire.kernels.team import REGIONS, advance, finish, region_of, take, wait

_I = types.int64

# Of the list of neurons, each group is read as four streams; its pieces are chunks. Fixed numbers, because they decide
# the order of additions.
_GROUPS, _PIECES = 4, 4
NEURON_CHUNKS = _GROUPS * _PIECES
_HEAD_CHUNKS = 4  # times as many as for the rows of other matrices
SOON = 2  # rows that are neighbours are asked for so many rows ahead

# Buffers of one token, float32 unless said: descriptors of `x` (hidden,) and `attended`, whose values are `joined`
# (heads * head_dim,); the residual stream `hidden` and what a block adds to it, `delta`; `query` (heads, head_width),
# `key` (head_width,); `parts` of the heads' attention, the ranges of one head so many bytes after those of the one
# before; `partial` (NEURON_CHUNKS, width); `cos` and `sin` (2, rope_half) of the RoPE angles. Each thread has `scores`
# (scratch of attention), `gate` and `up` (BLOCK,), `block` (2, BLOCK) int32 and `factors` (scratch of gather_axpy).
WORK = record("""
    x attended joined hidden delta qkv query key parts parts_stride scores scores_stride partial cos sin
    gate up block factors factors_stride
""")


@inline
def _add_listed(target, bias, rows, count):
    """target[j] += bias[rows[j]]."""
    if bias != 0:
        for j in range(0, 4 * count, 4):
            store_f32(target + j, load_f32(target + j) + load_f32(bias + 4 * load_i32(rows + j)))


@inline
def _row_chunks(team):
    """Chunks that the rows of a matrix are shared out in: few, since each begins with a wait for memory."""
    return 4 * team[REGIONS]


@inline
def _all_rows(model, team, dot, matrix, stride, count, chunk, chunks, x, out):
    """A chunk of the rows of a matrix: a piece of each quarter of its region (see `gather.py`)."""
    first, end = region_of(team, chunk, chunks)
    start, stop = count * first // chunks, count * end // chunks
    quarter, rows = (stop - start + 3) // 4, model.every + 4 * start
    piece = quarter * (chunk - first) // (end - first), quarter * (chunk - first + 1) // (end - first)
    call(dot, (matrix, stride, rows, rows + 4 * SOON, stride, stop - start, piece[0], piece[1], x, out + 4 * start))


@inline
def _add_neurons(model, weights, rows, soon, count, x, gate, up, y, scratch):
    """A few neurons: gather their gate and up rows, scatter their down rows into y."""
    stride, end = model.gate_stride, (count + 3) // 4
    call(model.gather_dot, (weights.gate, stride, rows, soon, stride, count, 0, end, x, gate))
    _add_listed(gate, weights.gate_bias, rows, count)
    call(model.activate, (model.activation, model.act_threshold, gate, count))
    stride, down = model.updown_stride, model.down
    if model.gated:
        call(model.gather_dot, (weights.updown, stride, rows, soon, down, count, 0, end, x, up))
        _add_listed(up, weights.up_bias, rows, count)
        if model.act_on_up:
            call(model.activate, (model.activation, model.act_threshold, up, count))
        multiply_by(gate, up, count)
    call(model.gather_axpy, (weights.updown + down, stride, rows, soon, count, gate, y, model.width, scratch))


@inline
def _fill_block(listed, count, start, stop, block):
    """Entries start to stop of each quarter of a list, in `block`, where the last one fills what is left; how many."""
    quarter, size = (count + 3) // 4, 0
    for part in range(0, 4 * quarter, quarter):
        for i in range(part + start, min(part + stop, count)):
            store_i32(block + 4 * size, load_i32(listed + 4 * i))
            size += 1
    for i in range(size, BLOCK):
        store_i32(block + 4 * i, load_i32(block + 4 * size - 4))
    return size


@inline
def _neurons(model, weights, listed, count, begin, end, x, block, gate, up, y, scratch):
    """y = the sum over entries begin to end of each quarter of a list of neurons.

    They go in blocks whose rows stay in the cache nearest to the core; during one, the next one's rows are asked for.
    """
    for i in range(0, 4 * model.width, 32):
        store_f32x8(y + i, splat_f32(0.0))
    quarter, step, rows, soon = (count + 3) // 4, BLOCK // 4, block, block + 4 * BLOCK
    size = _fill_block(listed, count, begin, min(begin + step, end), rows) if begin < end else 0
    for start in range(begin, end, step):
        follower, limit = start + step, end
        if follower >= end:  # the next chunk's, probably
            follower, limit = min(end, quarter - 1), quarter
        later = _fill_block(listed, count, follower, min(follower + step, limit), soon)
        _add_neurons(model, weights, rows, soon, size, x, gate, up, y, scratch)
        rows, soon, size = soon, rows, later


@inline
def _join_heads(model, ranges, parts, stride, joined):
    """All heads' attention from what was found in the ranges."""
    size, width = part_size(model), model.head_width
    for head in range(model.heads):
        part = parts + head * stride
        for number in range(1, ranges):
            call(model.merge, (part, part + number * size, width))
        call(model.settle, (part, width, model.head_dim, joined + 4 * head * model.head_dim))


@kernel(types.int64[::1], _I, _I, records(MODEL), records(LAYER), records(WORK), records(CACHE), _I, _I, _I)
def decode(team, phase, thread, models, layers, works, caches, token, position, logits):
    """Logits `(vocab,)` of the token at `position`, whose key and value go into the cache.

    Run by every thread of the team. `models`, `works` and `caches` hold one record each.
    """
    model, work, cache = models[0], works[0], caches[0]
    x, hidden, delta = work.x, work.hidden, work.delta
    if take(team, phase, thread, 1) >= 0:
        embed(model, token, position, hidden)
        set_rope(model, position, work.cos, work.sin)
        next_input(model, layers[0].attn_norm, layers[0].attn_norm_bias, hidden, x, 0, model.quantize)
        finish(team, 1)
        advance(team, phase)
    phase = wait(team, phase)

    for layer in range(model.layers):
        weights = layers[layer]
        rows, chunks = (model.heads + 2 * model.kv_heads) * model.head_dim, _row_chunks(team)
        chunk = take(team, phase, thread, chunks)
        while chunk >= 0:
            _all_rows(model, team, model.gather_dot, weights.qkv, model.qkv_stride, rows, chunk, chunks, x, work.qkv)
            if finish(team, chunks):
                add_to(work.qkv, weights.qkv_bias, rows)
                place_heads(model, weights, cache, layer, position, work.qkv, work.cos, work.sin, work.query, work.key)
                advance(team, phase)
            chunk = take(team, phase, thread, chunks)
        phase = wait(team, phase)

        first, scores = first_seen(weights, position) // RANGE, work.scores + thread * work.scores_stride
        ranges = position // RANGE + 1 - first
        pieces = model.kv_heads * ranges
        chunk = take(team, phase, thread, pieces)
        while chunk >= 0:
            kv_head, number = chunk // ranges, chunk % ranges
            at, stride = work.parts + number * part_size(model), work.parts_stride
            attend_group(
                model, weights, cache, layer, position, kv_head, first + number, work.query, scores, at, stride
            )
            if finish(team, pieces):
                _join_heads(model, ranges, work.parts, work.parts_stride, work.joined)
                quantize(model.quantize, work.attended, 0)
                advance(team, phase)
            chunk = take(team, phase, thread, pieces)
        phase = wait(team, phase)

        chunk = take(team, phase, thread, chunks)
        while chunk >= 0:
            matrix, size = (weights.o, model.o_stride), model.hidden
            _all_rows(model, team, model.gather_dot, *matrix, size, chunk, chunks, work.attended, delta)
            if finish(team, chunks):
                add_block(model, hidden, delta, weights.o_bias, weights.attn_post_norm)
                next_input(model, weights.ffn_norm, weights.ffn_norm_bias, hidden, x, 0, model.quantize)
                advance(team, phase)
            chunk = take(team, phase, thread, chunks)
        phase = wait(team, phase)

        chunk = take(team, phase, thread, NEURON_CHUNKS)
        while chunk >= 0:
            group, piece = chunk // _PIECES, chunk % _PIECES
            start, stop = model.neurons * group // _GROUPS, model.neurons * (group + 1) // _GROUPS
            quarter, listed, block = (
                (stop - start + 3) // 4,
                weights.active + 4 * start,
                work.block + 8 * BLOCK * thread,
            )
            begin, end = quarter * piece // _PIECES, quarter * (piece + 1) // _PIECES
            gate, up = work.gate + 4 * BLOCK * thread, work.up + 4 * BLOCK * thread
            y, scratch = work.partial + 4 * chunk * model.width, work.factors + thread * work.factors_stride
            _neurons(model, weights, listed, stop - start, begin, end, x, block, gate, up, y, scratch)
            if finish(team, NEURON_CHUNKS):
                for part in range(1, NEURON_CHUNKS):
                    add_to(work.partial, work.partial + 4 * part * model.width, model.hidden)
                add_block(model, hidden, work.partial, weights.down_bias, weights.ffn_post_norm)
                if layer + 1 < model.layers:
                    follower = layers[layer + 1]
                    next_input(model, follower.attn_norm, follower.attn_norm_bias, hidden, x, 0, model.quantize)
                else:
                    next_input(model, model.final_norm, model.final_norm_bias, hidden, x, 0, model.table_quantize)
                advance(team, phase)
            chunk = take(team, phase, thread, NEURON_CHUNKS)
        phase = wait(team, phase)

    chunks = _HEAD_CHUNKS * _row_chunks(team)
    chunk = take(team, phase, thread, chunks)
    while chunk >= 0:
        matrix, size = (model.head, model.table_stride), model.vocab
        _all_rows(model, team, model.table_dot, *matrix, size, chunk, chunks, x, logits)
        if finish(team, chunks):
            advance(team, phase)
        chunk = take(team, phase, thread, chunks)
    wait(team, phase)
