"""One token through all layers, compiled as one function that every thread of a team runs.

A layer is four phases (see `team.py`): q, k and v; attention, where a chunk is all queries of one cached head over a
range of positions; o; neurons, before which some selectors have a phase of their own (see `select.py`). Projections are
read by rows, or by columns if some of these are to be left out (see `columns.py`). What only selectors need are
primitives, compiled when a selection asks for them (see `selectors/steps.py`). The serial step that follows each
phase is small and done by whoever finished last. In the last phase a chunk of neurons goes through select, gather and
scatter on its own (see `neurons.py`). The sums of chunks are added in a fixed order, as are the ranges' parts. So the
result is the same bits for any number of threads.
"""

from numba import types

from fewfire.kernels.attention import RANGE
from fewfire.kernels.columns import COLUMN_CHUNKS, OUT, QKV
from fewfire.kernels.compile import ONE, ZERO, inline, kernel, records, step
from fewfire.kernels.head import all_logits
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
    row_chunks,
    set_rope,
)
from fewfire.kernels.neurons import BYPASS_CHUNKS, bypass_chunk, neuron_chunk
from fewfire.kernels.select import NEURON_CHUNKS
from fewfire.kernels.simd import ask, call
from fewfire.kernels.team import advance, finish, take, wait
from fewfire.kernels.work import WORK

_I = types.int64


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


@step
def _project(model, team, phase, thread, weights, work, cache, layer, position):
    """q, k and v."""
    rows = (model.heads + 2 * model.kv_heads) * model.head_dim
    chunks = row_chunks(team) if weights.qkv_columns == 0 else COLUMN_CHUNKS
    while True:
        chunk = take(team, phase, thread, chunks)
        if chunk < 0:
            break
        if weights.qkv_columns != 0:
            columns = weights.qkv_columns, model.qkv_column, weights.qkv_least, work.x, model.hidden, rows, work.qkv
            call(model.column_chunk, (model, work, thread, layer, QKV, chunk, *columns))
        else:
            matrix = weights.qkv, model.qkv_stride, rows
            all_rows(model, team, model.gather_dot, *matrix, chunk, chunks, work.x, work.qkv)
        if finish(team, chunks):
            if weights.qkv_columns != 0:
                call(model.join_chunks, (work, rows, work.qkv))
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
    chunks = row_chunks(team) if weights.o_columns == 0 else COLUMN_CHUNKS
    while True:
        chunk = take(team, phase, thread, chunks)
        if chunk < 0:
            break
        if weights.o_columns != 0:
            columns = weights.o_columns, model.o_column, weights.o_least, work.attended
            sizes = model.heads * model.head_dim, model.hidden
            call(model.column_chunk, (model, work, thread, layer, OUT, chunk, *columns, *sizes, work.delta))
        else:
            matrix = weights.o, model.o_stride, model.hidden
            all_rows(model, team, model.gather_dot, *matrix, chunk, chunks, work.attended, work.delta)
        if finish(team, chunks):
            if weights.o_columns != 0:
                call(model.join_chunks, (work, model.hidden, work.delta))
            add_block(model, work.hidden, work.delta, weights.o_bias, weights.attn_post_norm)
            next_input(model, weights.ffn_norm, weights.ffn_norm_bias, work.hidden, work.x, ZERO, model.quantize)
            if weights.bypass != 0:
                quantize(model.table_quantize, work.wide, ZERO)
            advance(team, phase)
    return wait(team, phase)


@step
def _fire(model, team, phase, thread, layers, work, cache, layer):
    """The neurons, the end of the FFN block; then the next layer's input, or the head's."""
    weights, x, hidden = layers[layer], work.x, work.hidden
    kept = cache.kept + layer * model.neurons if cache.kept != 0 else ZERO
    chunks = ZERO + NEURON_CHUNKS + (BYPASS_CHUNKS if weights.bypass != 0 else 0)
    while True:
        chunk = take(team, phase, thread, chunks)
        if chunk < 0:
            break
        if chunk < NEURON_CHUNKS:
            neuron_chunk(model, weights, work, layer, thread, chunk, kept)
        else:
            bypass_chunk(model, weights, chunk - NEURON_CHUNKS, work.wide, work.delta)
        if finish(team, chunks):
            for part in range(1, NEURON_CHUNKS):
                add_to(work.partial, work.partial + 4 * part * model.width, model.hidden)
            if weights.bypass != 0:
                add_to(work.partial, work.delta, model.hidden)
            add_block(model, hidden, work.partial, weights.down_bias, weights.ffn_post_norm)
            if layer + 1 < model.layers:
                follower = layers[layer + 1]
                next_input(model, follower.attn_norm, follower.attn_norm_bias, hidden, x, ZERO, model.quantize)
            else:
                next_input(model, model.final_norm, model.final_norm_bias, hidden, x, ZERO, model.table_quantize)
            advance(team, phase)
    return wait(team, phase)


_RECORDS = records(MODEL), records(LAYER), records(WORK), records(CACHE)


@kernel(types.int64[::1], _I, _I, *_RECORDS, _I, _I, types.float32[::1])
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
            phase = ask(model.reduce, (model, team, phase, thread, weights, work))
        if weights.top >= 0:
            phase = ask(model.find_top, (model, team, phase, thread, weights, work))
        if weights.ffn_columns != 0:
            phase = ask(model.all_gates, (model, team, phase, thread, weights, work, layer))
        phase = _fire(model, team, phase, thread, layers, work, cache, layer)
    if model.screen != 0:
        call(model.screened_logits, (model, team, phase, thread, work, logits.ctypes.data))
    else:
        all_logits(model, team, phase, thread, work, logits.ctypes.data)
