"""One token through all layers, compiled as one function that every thread of a team runs.

A layer is four phases (see `team.py`): rows of q, k and v; attention, where a chunk is all queries of one cached head
over a range of positions; rows of o; neurons. The serial step that follows each is small and done by whoever finished
last. In the last phase a chunk of neurons goes through select, gather and scatter on its own: gate rows, activation, up
rows, and the scaled down rows into the chunk's own y; the chunks' sums are added in a fixed order, as are the ranges'
parts. So the result is the same bits for any number of threads.
"""

from numba import types

from fewfire.kernels.attention import RANGE
from fewfire.kernels.compile import inline, kernel, records
from fewfire.kernels.gather import AHEAD
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
from fewfire.kernels.simd import call, load_f32, load_i32, splat_f32, store_f32, store_f32x8
from fewfire.kernels.team import advance, finish, take, wait

_I = types.int64

NEURON_CHUNKS = 16  # fixed, because it decides the order of additions
_ROW_CHUNKS = 12
_HEAD_ROWS = 512  # rows of the output head in a chunk

# Buffers of one token, float32 unless said: descriptors of `x` (hidden,) and `attended`, whose values are `joined`
# (heads * head_dim,); the residual stream `hidden` and what a block adds to it, `delta`; `query` (heads, head_width),
# `key` (head_width,); `parts` of the heads' attention, the ranges of one head so many bytes after those of the one
# before; `partial` (NEURON_CHUNKS, width); `cos` and `sin` (2, rope_half) of the RoPE angles. Each thread has `scores`
# (scratch of attention), `gate` and `up` (AHEAD + 8) and `factors` (scratch of gather_axpy), so many bytes apart.
WORK = record("""
    x attended joined hidden delta qkv query key parts parts_stride scores scores_stride partial cos sin
    gate up chunk_stride factors factors_stride
""")


@inline
def _share(chunk, chunks, count):
    """The part of range(count) that is a chunk's."""
    return count * chunk // chunks, count * (chunk + 1) // chunks


@inline
def _add_listed(target, bias, rows, count):
    """target[j] += bias[rows[j]]."""
    if bias != 0:
        for j in range(0, 4 * count, 4):
            store_f32(target + j, load_f32(target + j) + load_f32(bias + 4 * load_i32(rows + j)))


@inline
def _all_rows(model, dot, matrix, stride, start, stop, x, out):
    """Neighbouring rows, which are a list like any other."""
    count = stop - start
    call(dot, (matrix, stride, model.every + 4 * start, count, count, stride, x, out + 4 * start))


@inline
def _block(model, weights, rows, count, known, x, gate, up, y, scratch):
    """A few neurons: gather their gate and up rows, scatter their down rows into y."""
    stride, size = model.gate_stride, model.gate_stride
    call(model.gather_dot, (weights.gate, stride, rows, count, known, size, x, gate))
    _add_listed(gate, weights.gate_bias, rows, count)
    call(model.activate, (model.activation, model.act_threshold, gate, count))
    stride, down = model.updown_stride, model.down
    if model.gated:
        call(model.gather_dot, (weights.updown, stride, rows, count, known, size, x, up))
        _add_listed(up, weights.up_bias, rows, count)
        if model.act_on_up:
            call(model.activate, (model.activation, model.act_threshold, up, count))
        multiply_by(gate, up, count)
    size, width = stride - down, model.width
    call(model.gather_axpy, (weights.updown + down, stride, rows, count, known, size, gate, y, width, scratch))


@inline
def _neurons(model, weights, start, stop, x, gate, up, y, scratch):
    """The part of the active list from start to stop, in blocks whose rows stay in the first-level cache."""
    for i in range(0, 4 * model.width, 32):
        store_f32x8(y + i, splat_f32(0.0))
    for first in range(start, stop, AHEAD):
        rows, count, known = weights.active + 4 * first, min(AHEAD, stop - first), model.neurons - first
        _block(model, weights, rows, count, known, x, gate, up, y, scratch)


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
    if take(team, phase, 1) >= 0:
        embed(model, token, position, hidden)
        set_rope(model, position, work.cos, work.sin)
        next_input(model, layers[0].attn_norm, layers[0].attn_norm_bias, hidden, x, 0, model.quantize)
        finish(team, 1)
        advance(team, phase)
    phase = wait(team, phase)

    for layer in range(model.layers):
        weights = layers[layer]
        rows = (model.heads + 2 * model.kv_heads) * model.head_dim
        chunk = take(team, phase, _ROW_CHUNKS)
        while chunk >= 0:
            start, stop = _share(chunk, _ROW_CHUNKS, rows)
            _all_rows(model, model.gather_dot, weights.qkv, model.qkv_stride, start, stop, x, work.qkv)
            if weights.qkv_bias != 0:
                add_to(work.qkv + 4 * start, weights.qkv_bias + 4 * start, stop - start)
            if finish(team, _ROW_CHUNKS):
                place_heads(model, weights, cache, layer, position, work.qkv, work.cos, work.sin, work.query, work.key)
                advance(team, phase)
            chunk = take(team, phase, _ROW_CHUNKS)
        phase = wait(team, phase)

        first, scores = first_seen(weights, position) // RANGE, work.scores + thread * work.scores_stride
        ranges = position // RANGE + 1 - first
        chunks = model.kv_heads * ranges
        chunk = take(team, phase, chunks)
        while chunk >= 0:
            kv_head, number = chunk // ranges, chunk % ranges
            at, stride = work.parts + number * part_size(model), work.parts_stride
            attend_group(
                model, weights, cache, layer, position, kv_head, first + number, work.query, scores, at, stride
            )
            if finish(team, chunks):
                _join_heads(model, ranges, work.parts, work.parts_stride, work.joined)
                quantize(model.quantize, work.attended, 0)
                advance(team, phase)
            chunk = take(team, phase, chunks)
        phase = wait(team, phase)

        chunk = take(team, phase, _ROW_CHUNKS)
        while chunk >= 0:
            start, stop = _share(chunk, _ROW_CHUNKS, model.hidden)
            _all_rows(model, model.gather_dot, weights.o, model.o_stride, start, stop, work.attended, delta)
            if finish(team, _ROW_CHUNKS):
                add_block(model, hidden, delta, weights.o_bias, weights.attn_post_norm)
                next_input(model, weights.ffn_norm, weights.ffn_norm_bias, hidden, x, 0, model.quantize)
                advance(team, phase)
            chunk = take(team, phase, _ROW_CHUNKS)
        phase = wait(team, phase)

        chunk = take(team, phase, NEURON_CHUNKS)
        while chunk >= 0:
            start, stop = _share(chunk, NEURON_CHUNKS, model.neurons)
            gate, up = work.gate + thread * work.chunk_stride, work.up + thread * work.chunk_stride
            y, scratch = work.partial + 4 * chunk * model.width, work.factors + thread * work.factors_stride
            _neurons(model, weights, start, stop, x, gate, up, y, scratch)
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
            chunk = take(team, phase, NEURON_CHUNKS)
        phase = wait(team, phase)

    chunks = (model.vocab + _HEAD_ROWS - 1) // _HEAD_ROWS
    chunk = take(team, phase, chunks)
    while chunk >= 0:
        start, stop = _HEAD_ROWS * chunk, min(model.vocab, _HEAD_ROWS * chunk + _HEAD_ROWS)
        _all_rows(model, model.table_dot, model.head, model.table_stride, start, stop, x, logits)
        if finish(team, chunks):
            advance(team, phase)
        chunk = take(team, phase, chunks)
    wait(team, phase)
