"""One token through all layers, compiled as one function that every thread of a team runs.

A layer is four phases (see `team.py`): rows of q, k and v; attention, where a chunk is all queries of one cached head
over a range of positions; rows of o; neurons. Projections may be read by columns instead of rows, which makes a phase
of gate and up before the neurons. The serial step that follows each is small and done by whoever finished last. In the
last phase a chunk of neurons goes through select, gather and scatter on its own (see `neurons.py`). The sums of chunks
are added in a fixed order, as are the ranges' parts. So the result is the same bits for any number of threads.
"""

from numba import types

from fewfire.kernels.attention import RANGE
from fewfire.kernels.columns import COLUMN_CHUNKS, FFN, OUT, QKV, column_chunk, count_rows, join_chunks, settle_gates
from fewfire.kernels.compile import ONE, ZERO, inline, kernel, records
from fewfire.kernels.gather import SOON, VALUES
from fewfire.kernels.layer import (
    CACHE,
    LAYER,
    MODEL,
    add_block,
    add_to,
    attend_group,
    embed,
    first_seen,
    next_input,
    part_size,
    place_heads,
    quantize,
    record,
    set_rope,
)
from fewfire.kernels.neurons import NEURON_CHUNKS, neuron_chunk
from fewfire.kernels.simd import call, load_i64
from fewfire.kernels.team import REGIONS, advance, finish, region_of, take, wait

_I = types.int64

_HEAD_CHUNKS = 4  # times as many as for the rows of other matrices

# Buffers of one token, float32 unless said: descriptors of `x` (hidden,) and `attended`, whose values are `joined`
# (heads * head_dim,); the residual stream `hidden` and what a block adds to it, `delta`; `query` (heads, head_width),
# `key` (head_width,); `parts` of the heads' attention, the ranges of one head so many bytes after those of the one
# before; `partial` (NEURON_CHUNKS, width); `cos` and `sin` (2, rope_half) of the RoPE angles. Each thread has `scores`
# (scratch of attention), `ids` int32, `gate` and `up` (longest,) of a chunk of neurons, `block` (4, BLOCK) of those
# that are scattered together, `factors` (scratch of gather_axpy). `read` int64 (layers, NEURON_CHUNKS, 2): neurons
# whose up rows were read, and whose down rows were; `projected` int64 (layers, 3, COLUMN_CHUNKS): bytes of q, k and v,
# of o, and of gate and up if by columns, otherwise of gate.
#
# Projections by columns (see `columns.py`): the chunks' sums are in `partial` too; `gates` and `ups` (neurons,) are
# what neurons are given then; before, `gates` has the columns' sum, all gate rows and then all up rows.
WORK = record("""
    x attended joined hidden delta qkv query key parts parts_stride scores scores_stride partial cos sin
    ids gate up longest block factors factors_stride read projected gates ups
""")


@inline
def _row_chunks(team):
    """Chunks that the rows of a matrix are shared out in.

    Few, since streams begin anew with each (perf/LOG.md, "chunks that go on where the last one ended").
    """
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
    if take(team, phase, thread, ONE) >= 0:
        embed(model, token, position, hidden)
        set_rope(model, position, work.cos, work.sin)
        next_input(model, layers[0].attn_norm, layers[0].attn_norm_bias, hidden, x, ZERO, model.quantize)
        finish(team, ONE)
        advance(team, phase)
    phase = wait(team, phase)

    for layer in range(model.layers):
        weights = layers[layer]
        rows, chunks = (model.heads + 2 * model.kv_heads) * model.head_dim, _row_chunks(team)
        pieces = chunks if weights.qkv_columns == 0 else COLUMN_CHUNKS
        while True:
            chunk = take(team, phase, thread, pieces)
            if chunk < 0:
                break
            matrix, qkv = (weights.qkv, model.qkv_stride), work.qkv
            if weights.qkv_columns == 0:
                _all_rows(model, team, model.gather_dot, *matrix, rows, chunk, chunks, x, qkv)
            else:
                at = weights.qkv_columns, model.qkv_column, weights.qkv_least, load_i64(x + VALUES)
                column_chunk(model, work, thread, layer, QKV, chunk, *at, model.hidden, rows, qkv)
            if finish(team, pieces):
                if weights.qkv_columns == 0:
                    count_rows(work, layer, QKV, rows * model.qkv_stride)
                else:
                    join_chunks(work, rows, qkv)
                add_to(qkv, weights.qkv_bias, rows)
                place_heads(model, weights, cache, layer, position, qkv, work.cos, work.sin, work.query, work.key)
                advance(team, phase)
        phase = wait(team, phase)

        first, scores = first_seen(weights, position) // RANGE, work.scores + thread * work.scores_stride
        ranges = position // RANGE + 1 - first
        pieces = model.kv_heads * ranges
        while True:
            chunk = take(team, phase, thread, pieces)
            if chunk < 0:
                break
            kv_head, number = chunk // ranges, chunk % ranges
            at, stride = work.parts + number * part_size(model), work.parts_stride
            attend_group(
                model, weights, cache, layer, position, kv_head, first + number, work.query, scores, at, stride
            )
            if finish(team, pieces):
                _join_heads(model, ranges, work.parts, work.parts_stride, work.joined)
                quantize(model.quantize, work.attended, 0)
                advance(team, phase)
        phase = wait(team, phase)

        pieces = chunks if weights.o_columns == 0 else COLUMN_CHUNKS
        while True:
            chunk = take(team, phase, thread, pieces)
            if chunk < 0:
                break
            matrix, size = (weights.o, model.o_stride), model.hidden
            if weights.o_columns == 0:
                _all_rows(model, team, model.gather_dot, *matrix, size, chunk, chunks, work.attended, delta)
            else:
                at = weights.o_columns, model.o_column, weights.o_least, work.joined
                column_chunk(model, work, thread, layer, OUT, chunk, *at, model.heads * model.head_dim, size, delta)
            if finish(team, pieces):
                if weights.o_columns == 0:
                    count_rows(work, layer, OUT, size * model.o_stride)
                else:
                    join_chunks(work, size, delta)
                add_block(model, hidden, delta, weights.o_bias, weights.attn_post_norm)
                next_input(model, weights.ffn_norm, weights.ffn_norm_bias, hidden, x, ZERO, model.quantize)
                advance(team, phase)
        phase = wait(team, phase)

        if weights.ffn_columns != 0:
            outputs = model.neurons * (2 if model.gated else 1)
            while True:
                chunk = take(team, phase, thread, COLUMN_CHUNKS)
                if chunk < 0:
                    break
                at = weights.ffn_columns, model.ffn_column, weights.ffn_least, load_i64(x + VALUES)
                column_chunk(model, work, thread, layer, FFN, chunk, *at, model.hidden, outputs, work.gates)
                if finish(team, COLUMN_CHUNKS):
                    join_chunks(work, outputs, work.gates)
                    settle_gates(model, weights, work)
                    advance(team, phase)
            phase = wait(team, phase)

        while True:
            chunk = take(team, phase, thread, NEURON_CHUNKS)
            if chunk < 0:
                break
            neuron_chunk(model, weights, work, layer, thread, chunk)
            if finish(team, NEURON_CHUNKS):
                if weights.ffn_columns == 0:
                    count_rows(work, layer, FFN, model.neurons * model.gate_stride)
                for part in range(1, NEURON_CHUNKS):
                    add_to(work.partial, work.partial + 4 * part * model.width, model.hidden)
                add_block(model, hidden, work.partial, weights.down_bias, weights.ffn_post_norm)
                if layer + 1 < model.layers:
                    follower = layers[layer + 1]
                    next_input(model, follower.attn_norm, follower.attn_norm_bias, hidden, x, ZERO, model.quantize)
                else:
                    next_input(model, model.final_norm, model.final_norm_bias, hidden, x, ZERO, model.table_quantize)
                advance(team, phase)
        phase = wait(team, phase)

    chunks = _HEAD_CHUNKS * _row_chunks(team)
    while True:
        chunk = take(team, phase, thread, chunks)
        if chunk < 0:
            break
        matrix, size = (model.head, model.table_stride), model.vocab
        _all_rows(model, team, model.table_dot, *matrix, size, chunk, chunks, x, logits)
        if finish(team, chunks):
            advance(team, phase)
    wait(team, phase)
