"""One token through all layers, compiled as one function that every thread of a team runs.

A layer is four phases (see `team.py`): q, k and v; attention, where a chunk is all queries of one cached head over a
range of positions; o; neurons, before which some selectors have a phase of their own (see `select.py`). Projections are
read by rows, or by columns if some of these are to be left out (see `columns.py`). The serial step that follows each
phase is small and done by whoever finished last. In the last phase a chunk of neurons goes through select, gather and
scatter on its own (see `neurons.py`). The sums of chunks are added in a fixed order, as are the ranges' parts. So the
result is the same bits for any number of threads.
"""

from numba import types

from fewfire.kernels.attention import RANGE
from fewfire.kernels.columns import COLUMN_CHUNKS, FFN, OUT, QKV, column_chunk, join_chunks, settle_gates
from fewfire.kernels.compile import ONE, ZERO, inline, kernel, records, step
from fewfire.kernels.head import all_logits, screened_logits
from fewfire.kernels.layer import (
    CACHE,
    LAYER,
    MODEL,
    add_block,
    add_to,
    all_rows,
    attend_group,
    embed,
    first_seen,
    next_input,
    part_size,
    place_heads,
    quantize,
    record,
    row_chunks,
    set_rope,
)
from fewfire.kernels.neurons import neuron_chunk
from fewfire.kernels.select import NEURON_CHUNKS, find_top, reduce
from fewfire.kernels.simd import call
from fewfire.kernels.team import advance, finish, take, wait

_I = types.int64

# Buffers of one token, float32 unless said: descriptors of `x` (hidden,) and `attended`, whose values are `joined`
# (heads * head_dim,); the residual stream `hidden` and what a block adds to it, `delta`; `query` (heads, head_width),
# `key` (head_width,); `parts` of the heads' attention, the ranges of one head so many bytes after those of the one
# before; `partial` sums of chunks, (NEURON_CHUNKS, width) or (COLUMN_CHUNKS, outputs padded); `cos` and `sin`
# (2, rope_half) of the RoPE angles. Each thread has `scores` (scratch of attention), `ids` int32, `gate` and `up`
# (longest,) of a chunk of neurons, `block` (4, BLOCK) of those that are scattered together, `factors` (scratch of
# gather_axpy). For selectors: the descriptor of `hint`, whose values are `hint_values` (rank,), of a predictor; `gates`
# and `ups` (neurons,) where they are there before the neurons' phase (`gates` has room for the columns' sums, all gate
# rows and then all up rows), and `least`, which the largest gates are over, and at last the logits of candidates. For a
# screened head (see `head.py`) the descriptor of `reduced`, whose values are `screened` (screen_rank,); of each of its
# HEAD_CHUNKS the `largest` logit and the `totals` of exp(logit - largest); of each thread `candidates` int32 (LIST,)
# and their `values`. What was read is counted, int64: gate, up and down rows in `read` (layers, NEURON_CHUNKS, 3);
# bytes of the columns of qkv, of o, and of gate with up in `projected` (layers, 3, COLUMN_CHUNKS); rows of the head in
# `exact` (HEAD_CHUNKS,).
WORK = record("""
    x attended joined hidden delta qkv query key parts parts_stride scores scores_stride partial cos sin
    ids gate up longest block factors factors_stride read
    hint hint_values gates ups least projected
    reduced screened largest totals exact candidates values
""")


@step
def _begin(model, team, phase, thread, weights, work, token, position):
    """The token's embedding, and the first layer's input."""
    if take(team, phase, thread, ONE) >= 0:
        embed(model, token, position, work.hidden)
        set_rope(model, position, work.cos, work.sin)
        next_input(model, weights.attn_norm, weights.attn_norm_bias, work.hidden, work.x, ZERO, model.quantize)
        finish(team, ONE)
        advance(team, phase)
    return wait(team, phase)


@inline
def _piece(model, team, work, thread, layer, projection, chunk, chunks, columns, matrix, x, inputs, outputs, out):
    """A chunk of a projection of x: of its columns if it is read by them, else of its rows."""
    if columns[0] != 0:
        column_chunk(model, work, thread, layer, projection, chunk, *columns, x, inputs, outputs, out)
    else:
        all_rows(model, team, model.gather_dot, *matrix, outputs, chunk, chunks, x, out)


@step
def _project(model, team, phase, thread, weights, work, cache, layer, position):
    """q, k and v."""
    columns, matrix = (weights.qkv_columns, model.qkv_column, weights.qkv_least), (weights.qkv, model.qkv_stride)
    rows = (model.heads + 2 * model.kv_heads) * model.head_dim
    chunks = row_chunks(team) if columns[0] == 0 else COLUMN_CHUNKS
    while True:
        chunk = take(team, phase, thread, chunks)
        if chunk < 0:
            break
        sizes = model.hidden, rows
        _piece(model, team, work, thread, layer, QKV, chunk, chunks, columns, matrix, work.x, *sizes, work.qkv)
        if finish(team, chunks):
            if columns[0] != 0:
                join_chunks(work, rows, work.qkv)
            add_to(work.qkv, weights.qkv_bias, rows)
            place_heads(model, weights, cache, layer, position, work.qkv, work.cos, work.sin, work.query, work.key)
            advance(team, phase)
    return wait(team, phase)


@inline
def _join_heads(model, ranges, parts, stride, joined):
    """All heads' attention from what was found in the ranges."""
    size, width = part_size(model), model.head_width
    for head in range(model.heads):
        part = parts + head * stride
        for number in range(1, ranges):
            call(model.merge, (part, part + number * size, width))
        call(model.settle, (part, width, model.head_dim, joined + 4 * head * model.head_dim))


@step
def _attend(model, team, phase, thread, weights, work, cache, layer, position):
    """The heads, side by side."""
    first, scores = first_seen(weights, position) // RANGE, work.scores + thread * work.scores_stride
    ranges = position // RANGE + 1 - first
    chunks = model.kv_heads * ranges
    while True:
        chunk = take(team, phase, thread, chunks)
        if chunk < 0:
            break
        kv_head, number = chunk // ranges, chunk % ranges
        at, stride = work.parts + number * part_size(model), work.parts_stride
        attend_group(model, weights, cache, layer, position, kv_head, first + number, work.query, scores, at, stride)
        if finish(team, chunks):
            _join_heads(model, ranges, work.parts, work.parts_stride, work.joined)
            quantize(model.quantize, work.attended, ZERO)
            advance(team, phase)
    return wait(team, phase)


@step
def _put_out(model, team, phase, thread, weights, work, layer):
    """o, the end of the attention block; then the FFN's input."""
    columns, matrix = (weights.o_columns, model.o_column, weights.o_least), (weights.o, model.o_stride)
    chunks = row_chunks(team) if columns[0] == 0 else COLUMN_CHUNKS
    while True:
        chunk = take(team, phase, thread, chunks)
        if chunk < 0:
            break
        sizes = model.heads * model.head_dim, model.hidden
        _piece(model, team, work, thread, layer, OUT, chunk, chunks, columns, matrix, work.attended, *sizes, work.delta)
        if finish(team, chunks):
            if columns[0] != 0:
                join_chunks(work, model.hidden, work.delta)
            add_block(model, work.hidden, work.delta, weights.o_bias, weights.attn_post_norm)
            next_input(model, weights.ffn_norm, weights.ffn_norm_bias, work.hidden, work.x, ZERO, model.quantize)
            advance(team, phase)
    return wait(team, phase)


@step
def _all_gates(model, team, phase, thread, weights, work, layer):
    """Gate and up of all neurons, by columns."""
    outputs = model.neurons * (2 if model.gated else 1)
    while True:
        chunk = take(team, phase, thread, COLUMN_CHUNKS)
        if chunk < 0:
            break
        columns = weights.ffn_columns, model.ffn_column, weights.ffn_least
        column_chunk(model, work, thread, layer, FFN, chunk, *columns, work.x, model.hidden, outputs, work.gates)
        if finish(team, COLUMN_CHUNKS):
            join_chunks(work, outputs, work.gates)
            settle_gates(model, weights, work)
            advance(team, phase)
    return wait(team, phase)


@step
def _fire(model, team, phase, thread, layers, work, cache, layer):
    """The neurons, the end of the FFN block; then the next layer's input, or the head's."""
    weights, x, hidden = layers[layer], work.x, work.hidden
    kept = cache.kept + layer * model.neurons if cache.kept != 0 else ZERO
    while True:
        chunk = take(team, phase, thread, NEURON_CHUNKS)
        if chunk < 0:
            break
        neuron_chunk(model, weights, work, layer, thread, chunk, kept)
        if finish(team, NEURON_CHUNKS):
            for part in range(1, NEURON_CHUNKS):
                add_to(work.partial, work.partial + 4 * part * model.width, model.hidden)
            add_block(model, hidden, work.partial, weights.down_bias, weights.ffn_post_norm)
            if layer + 1 < model.layers:
                follower = layers[layer + 1]
                next_input(model, follower.attn_norm, follower.attn_norm_bias, hidden, x, ZERO, model.quantize)
            else:
                next_input(model, model.final_norm, model.final_norm_bias, hidden, x, ZERO, model.table_quantize)
            advance(team, phase)
    return wait(team, phase)


@kernel(types.int64[::1], _I, _I, records(MODEL), records(LAYER), records(WORK), records(CACHE), _I, _I, _I)
def decode(team, phase, thread, models, layers, works, caches, token, position, logits):
    """Logits `(vocab,)` of the token at `position`, whose key and value go into the cache.

    Run by every thread of the team. `models`, `works` and `caches` hold one record each.
    """
    model, work, cache = models[0], works[0], caches[0]
    phase = _begin(model, team, phase, thread, layers[0], work, token, position)
    for layer in range(model.layers):
        weights = layers[layer]
        phase = _project(model, team, phase, thread, weights, work, cache, layer, position)
        phase = _attend(model, team, phase, thread, weights, work, cache, layer, position)
        phase = _put_out(model, team, phase, thread, weights, work, layer)
        if weights.basis != 0:
            phase = reduce(model, team, phase, thread, weights, work)
        if weights.top >= 0:
            phase = find_top(model, team, phase, thread, weights, work)
        if weights.ffn_columns != 0:
            phase = _all_gates(model, team, phase, thread, weights, work, layer)
        phase = _fire(model, team, phase, thread, layers, work, cache, layer)
    if model.screen != 0:
        screened_logits(model, team, phase, thread, work, logits)
    else:
        all_logits(model, team, phase, thread, work, logits)
