"""A batch of tokens through all layers: the same steps as `decode.py`, with matrix products instead of single rows.

All neurons are computed: between them, the tokens of a batch use nearly all. What a model was trained without is zero.
"""

from numba import types

from fewfire.kernels.compile import inline, kernel, records
from fewfire.kernels.dense import STRIP, TOKENS
from fewfire.kernels.gather import COLUMNS, LANES, QUANTS, SCALES, SCRATCH, SUMS, VALUES
from fewfire.kernels.layer import (
    CACHE,
    LAYER,
    MODEL,
    add_block,
    add_to,
    attend_block,
    copy,
    embed,
    multiply_by,
    next_input,
    place_heads,
    quantize,
    record,
    set_rope,
)
from fewfire.kernels.simd import call, load_i64, store_i64
from fewfire.kernels.team import advance, finish, take, wait

_I = types.int64

ROWS = 16  # rows or neurons in a chunk
_HEAD_ROWS = 64

# Buffers of a batch of `tokens` tokens (a multiple of 4): row t belongs to token t; otherwise as in `decode.WORK`.
# `fired` (tokens, neurons) is act(gate) * up; `gates` (tokens, neurons) is act(gate) and `routes` (tokens, groups) are
# the scores of groups of neurons, in models that were trained with a choice by these. Each thread has `gate` and `up`
# (tokens, ROWS), `panel` (64 * 64 floats), `key`, `parts` and `scores` (scratch of attention), and the descriptor
# `wanted` of the vectors whose logits are asked for.
BATCH = record("""
    tokens x wide attended joined joined_stride hidden delta qkv query fired gates routes cos sin
    gate up chunk_stride panel key key_stride parts parts_stride scores scores_stride wanted
""")


@inline
def _chunks(count, size):
    return (count + size - 1) // size


@inline
def _inputs(model, weight, bias, batch, start, stop, quantizer):
    for t in range(start, stop):
        next_input(model, weight, bias, batch.hidden + 4 * t * model.width, batch.x, t, quantizer)


@inline
def _add_blocks(model, batch, bias, post_norm, start, stop):
    for t in range(start, stop):
        row = 4 * t * model.width
        add_block(model, batch.hidden + row, batch.delta + row, bias, post_norm)


@inline
def _bias_columns(bias, count, out, stride, tokens):
    """out[t, :count] += bias[:count] for all tokens."""
    if bias != 0:
        for t in range(tokens):
            add_to(out + t * stride, bias, count)


@inline
def _offset(base, start):
    """The address of element `start` of a float32 vector that the model may not have."""
    return base + 4 * start if base != 0 else 0


@inline
def _fire(model, weights, batch, start, count, gate, up):
    """act(gate) * up of some neurons, all tokens."""
    x, tokens, size = batch.x, batch.tokens, batch.tokens * ROWS
    thresholds = weights.act_threshold, model.every + 4 * start, ROWS
    rows = weights.gate + start * model.gate_stride
    call(model.dot_tokens, (rows, model.gate_stride, count, x, tokens, gate, 4 * ROWS))
    _bias_columns(_offset(weights.gate_bias, start), count, gate, 4 * ROWS, tokens)
    call(model.activate, (model.activation, gate, size, weights.act_centre, *thresholds))
    if batch.gates != 0:
        for t in range(tokens):
            copy(batch.gates + 4 * (t * model.neurons + start), gate + 4 * t * ROWS, count)
    if model.gated:
        rows = weights.updown + start * model.updown_stride
        call(model.dot_tokens, (rows, model.updown_stride, count, x, tokens, up, 4 * ROWS))
        _bias_columns(_offset(weights.up_bias, start), count, up, 4 * ROWS, tokens)
        if model.act_on_up:
            call(model.activate, (model.activation, up, size, 0, *thresholds))
        multiply_by(gate, up, size)
    for t in range(tokens):
        copy(batch.fired + 4 * (t * model.neurons + start), gate + 4 * t * ROWS, count)


@inline
def _add_bypass(model, weights, batch, strip, out):
    """batch.delta += bypass times x, a strip of the outputs, all tokens; `out`: scratch (tokens, ROWS)."""
    tokens, stride, end = batch.tokens, model.table_stride, min(model.hidden, STRIP * (strip + 1))
    for start in range(STRIP * strip, end, ROWS):
        count = min(end - start, ROWS)
        call(model.table_tokens, (weights.bypass + start * stride, stride, count, batch.wide, tokens, out, 4 * ROWS))
        for t in range(tokens):
            add_to(batch.delta + 4 * (t * model.width + start), out + 4 * t * ROWS, count)


@inline
def _route(model, weights, batch, start):
    """Scores of some groups of neurons, all tokens."""
    count, matrix = min(weights.groups - start, ROWS), weights.predictor + start * weights.predictor_stride
    out, stride = batch.routes + 4 * start, 4 * weights.groups
    call(model.dot_tokens, (matrix, weights.predictor_stride, count, batch.x, batch.tokens, out, stride))


@inline
def _leave_out(model, weights, batch):
    """Zeroes what tokens do not need, in models that were trained so."""
    if model.leave_out != 0:
        chosen = batch.gates, weights.top, batch.routes, weights.groups
        groups = weights.predictor_bias, weights.active, weights.group_size
        call(model.leave_out, (batch.fired, batch.tokens, model.neurons, *chosen, *groups))


@inline
def _last_vectors(x, skipped, integer, out):
    """Writes the descriptor of all vectors of x but the first `skipped`; `integer`: bytes of a quant."""
    columns, lanes = load_i64(x + COLUMNS), load_i64(x + LANES)
    store_i64(out + VALUES, load_i64(x + VALUES) + 4 * skipped * columns)
    store_i64(out + QUANTS, load_i64(x + QUANTS) + integer * skipped * columns)
    store_i64(out + SCALES, load_i64(x + SCALES) + 4 * skipped * lanes)
    store_i64(out + SUMS, load_i64(x + SUMS) + 4 * skipped * lanes)
    store_i64(out + COLUMNS, columns)
    store_i64(out + LANES, lanes)
    store_i64(out + SCRATCH, load_i64(x + SCRATCH) + 512 * skipped)


@kernel(
    types.int64[::1], _I, _I, records(MODEL), records(LAYER), records(BATCH), records(CACHE),
    types.int32[::1], _I, _I, types.float32[:, ::1],
)  # fmt: skip
def prefill(team, phase, thread, models, layers, batches, caches, tokens, position, rows, logits):
    """The tokens (int32) from `position` on; their keys and values go into the cache.

    Run by every thread of the team. `models`, `batches` and `caches` hold one record each. Logits `(rows, vocab)` are
    of the batch's last `rows` tokens, a multiple of 4 and its padding included.
    """
    model, batch, cache, count = models[0], batches[0], caches[0], tokens.size
    x, width, padded = batch.x, 4 * model.width, batch.tokens
    blocks = _chunks(count, TOKENS)

    while True:
        block = take(team, phase, thread, blocks)
        if block < 0:
            break
        start, stop = TOKENS * block, min(count, TOKENS * block + TOKENS)
        for t in range(start, stop):
            embed(model, tokens[t], position + t, batch.hidden + t * width)
            angles = 8 * t * model.rope_half
            set_rope(model, position + t, batch.cos + angles, batch.sin + angles)
        _inputs(model, layers[0].attn_norm, layers[0].attn_norm_bias, batch, start, stop, model.quantize)
        if finish(team, blocks):
            advance(team, phase)
    phase = wait(team, phase)

    for layer in range(model.layers):
        weights = layers[layer]
        total = (model.heads + 2 * model.kv_heads) * model.head_dim
        chunks = _chunks(total, ROWS)
        while True:
            chunk = take(team, phase, thread, chunks)
            if chunk < 0:
                break
            start = ROWS * chunk
            part, matrix, out = min(total - start, ROWS), weights.qkv + start * model.qkv_stride, batch.qkv + 4 * start
            call(model.dot_tokens, (matrix, model.qkv_stride, part, x, padded, out, 4 * total))
            _bias_columns(_offset(weights.qkv_bias, start), part, out, 4 * total, padded)
            if finish(team, chunks):
                advance(team, phase)
        phase = wait(team, phase)

        queries = 4 * model.heads * model.head_width
        key = batch.key + thread * batch.key_stride
        while True:
            block = take(team, phase, thread, blocks)
            if block < 0:
                break
            for t in range(TOKENS * block, min(count, TOKENS * block + TOKENS)):
                angles, qkv, query = 8 * t * model.rope_half, batch.qkv + 4 * t * total, batch.query + t * queries
                cos, sin = batch.cos + angles, batch.sin + angles
                place_heads(model, weights, cache, layer, position + t, qkv, cos, sin, query, key)
            if finish(team, blocks):
                advance(team, phase)
        phase = wait(team, phase)

        scores, parts = batch.scores + thread * batch.scores_stride, batch.parts + thread * batch.parts_stride
        while True:
            block = take(team, phase, thread, blocks)
            if block < 0:
                break
            t = TOKENS * block
            several, stride = min(count - t, TOKENS), batch.joined_stride
            query, joined = batch.query + t * queries, batch.joined + t * stride
            attend_block(model, weights, cache, layer, position + t, several, query, scores, parts, joined, stride)
            for other in range(t, t + several):
                quantize(model.quantize, batch.attended, other)
            if finish(team, blocks):
                advance(team, phase)
        phase = wait(team, phase)

        chunks = _chunks(model.hidden, ROWS)
        while True:
            chunk = take(team, phase, thread, chunks)
            if chunk < 0:
                break
            start = ROWS * chunk
            part, matrix, out = (
                min(model.hidden - start, ROWS),
                weights.o + start * model.o_stride,
                batch.delta + 4 * start,
            )
            call(model.dot_tokens, (matrix, model.o_stride, part, batch.attended, padded, out, width))
            if finish(team, chunks):
                advance(team, phase)
        phase = wait(team, phase)

        while True:
            block = take(team, phase, thread, blocks)
            if block < 0:
                break
            start, stop = TOKENS * block, min(count, TOKENS * block + TOKENS)
            _add_blocks(model, batch, weights.o_bias, weights.attn_post_norm, start, stop)
            _inputs(model, weights.ffn_norm, weights.ffn_norm_bias, batch, start, stop, model.quantize)
            if weights.bypass != 0:
                for t in range(start, stop):
                    quantize(model.table_quantize, batch.wide, t)
            if finish(team, blocks):
                advance(team, phase)
        phase = wait(team, phase)

        gate, up = batch.gate + thread * batch.chunk_stride, batch.up + thread * batch.chunk_stride
        fires = _chunks(model.neurons, ROWS)
        chunks = fires + (_chunks(weights.groups, ROWS) if model.leave_out != 0 else 0)
        while True:
            chunk = take(team, phase, thread, chunks)
            if chunk < 0:
                break
            if chunk < fires:
                start = ROWS * chunk
                _fire(model, weights, batch, start, min(model.neurons - start, ROWS), gate, up)
            else:
                _route(model, weights, batch, ROWS * (chunk - fires))
            if finish(team, chunks):
                _leave_out(model, weights, batch)
                advance(team, phase)
        phase = wait(team, phase)

        downs, strips, panel = weights.updown + model.down, model.width // STRIP, batch.panel + thread * 4 * 64 * 64
        while True:
            strip = take(team, phase, thread, strips)
            if strip < 0:
                break
            matrix = (downs, model.updown_stride, model.neurons, model.width, strip)
            call(model.down_strip, (*matrix, padded, batch.fired, 4 * model.neurons, panel, batch.delta, width))
            if weights.bypass != 0:
                _add_bypass(model, weights, batch, strip, gate)
            if finish(team, strips):
                advance(team, phase)
        phase = wait(team, phase)

        while True:
            block = take(team, phase, thread, blocks)
            if block < 0:
                break
            start, stop = TOKENS * block, min(count, TOKENS * block + TOKENS)
            _add_blocks(model, batch, weights.down_bias, weights.ffn_post_norm, start, stop)
            if layer + 1 < model.layers:
                follower = layers[layer + 1]
                _inputs(model, follower.attn_norm, follower.attn_norm_bias, batch, start, stop, model.quantize)
            else:
                _inputs(model, model.final_norm, model.final_norm_bias, batch, start, stop, model.table_quantize)
            if finish(team, blocks):
                advance(team, phase)
        phase = wait(team, phase)

    wanted = batch.wanted + thread * (SCRATCH + 8)
    _last_vectors(x, padded - rows, model.table_integer, wanted)
    chunks = _chunks(model.vocab, _HEAD_ROWS)
    while True:
        chunk = take(team, phase, thread, chunks)
        if chunk < 0:
            break
        start = _HEAD_ROWS * chunk
        part, matrix = min(model.vocab - start, _HEAD_ROWS), model.head + start * model.table_stride
        out = logits.ctypes.data + 4 * start
        call(model.table_tokens, (matrix, model.table_stride, part, wanted, rows, out, 4 * model.vocab))
        if finish(team, chunks):
            advance(team, phase)
    wait(team, phase)
