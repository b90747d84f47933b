"""A batch of tokens through all layers: the same phases as `decode.py`, with matrix products instead of single rows.

All neurons are computed: between them, the tokens of a batch use nearly all.
"""

from fewfire.kernels.compile import inline, kernel
from fewfire.kernels.dense import STRIP, TOKENS
from fewfire.kernels.gather import COLUMNS, LANES, QUANTS, SCALES, SUMS, VALUES
from fewfire.kernels.layer import (
    add_block,
    at,
    cell,
    embed,
    first_visible,
    next_input,
    place_heads,
    row_of,
    set_rope,
)
from fewfire.kernels.simd import call
from fewfire.kernels.team import advance, finish, take, wait

NEURONS = 16  # neurons of a chunk
_ROWS = 16  # rows of a chunk
_HEAD_ROWS = 64


@inline
def _chunks(count, size):
    return (count + size - 1) // size


@inline
def _next_inputs(run, weights, biases, layer, shape, hidden, x, start, stop):
    for t in range(start, stop):
        next_input(run, weights, biases, layer, shape, hidden[t], x, t)


@inline
def _add_blocks(run, hidden, delta, biases, post_norm, layer, shape, start, stop):
    for t in range(start, stop):
        add_block(run, hidden[t], delta[t], biases, post_norm, layer, shape)


@inline
def _bias_columns(biases, layer, start, count, out, column):
    """out[t, column + i] += bias[start + i] for all tokens."""
    if biases.shape[0] > 0:
        for t in range(out.shape[0]):
            for i in range(count):
                out[t, column + i] += biases[layer, start + i]


@inline
def _fire(run, weights, shape, layer, start, count, x, gate, up, fired):
    """act(gate) * up of some neurons, all tokens."""
    tokens, row = gate.shape[0], 4 * gate.shape[1]
    gates, ups = row_of(weights.gate, layer, start), row_of(weights.updown, layer, start)
    call(run.dot_tokens, (gates, weights.gate.shape[2], count, x, tokens, at(gate), row))
    _bias_columns(weights.gate_bias, layer, start, count, gate, 0)
    call(run.activate, (shape.activation, shape.act_threshold, at(gate), gate.size))
    if shape.gated:
        call(run.dot_tokens, (ups, weights.updown.shape[2], count, x, tokens, at(up), row))
        _bias_columns(weights.up_bias, layer, start, count, up, 0)
        if shape.act_on_up:
            call(run.activate, (shape.activation, shape.act_threshold, at(up), up.size))
        for t in range(tokens):
            for j in range(count):
                fired[t, start + j] = gate[t, j] * up[t, j]
    else:
        for t in range(tokens):
            for j in range(count):
                fired[t, start + j] = gate[t, j]


@inline
def _attend(run, weights, shape, layer, position, cache, query, scores, context, out):
    """All heads of one token; `out` is the address of the joined heads."""
    start, stop = first_visible(weights, layer, position), position + 1
    for head in range(shape.heads):
        kv_head = head * shape.kv_heads // shape.heads
        keys, values = cell(cache.keys, layer, kv_head, 0), cell(cache.values, layer, kv_head, 0)
        scale, width = shape.attention_scale, context.size
        call(run.attend, (keys, values, start, stop, at(query[head]), scale, at(scores), at(context), width))
        for i in range(shape.head_dim):
            out[head * shape.head_dim + i] = context[i]


@kernel
def prefill(team, phase, thread, run, weights, shape, tokens, position, cache, batch, logits):
    """The tokens from `position` on; their keys and values go into the cache; run by every thread of the team.

    tokens: int32; logits: (a multiple of 4, vocab) float32, of the batch's last tokens, its padding included. Other
    arguments as in `layer.py`.
    """
    count, hidden, padded = tokens.size, batch.hidden, batch.hidden.shape[0]
    x, attended = at(batch.x), at(batch.attended)
    blocks = _chunks(count, TOKENS)

    block = take(team, phase, blocks)
    while block >= 0:
        start, stop = TOKENS * block, min(count, TOKENS * block + TOKENS)
        for t in range(start, stop):
            embed(run, weights, shape, tokens[t], position + t, hidden[t])
            set_rope(weights, position + t, batch.cos[t], batch.sin[t])
        _next_inputs(run, weights.attn_norm, weights.attn_norm_bias, 0, shape, hidden, x, start, stop)
        if finish(team, blocks):
            advance(team, phase)
        block = take(team, phase, blocks)
    phase = wait(team, phase)

    for layer in range(shape.layers):
        rows = weights.qkv.shape[1]
        chunks = _chunks(rows, _ROWS)
        chunk = take(team, phase, chunks)
        while chunk >= 0:
            start = _ROWS * chunk
            part, out, row = min(rows - start, _ROWS), at(batch.qkv) + 4 * start, 4 * rows
            matrix, stride = row_of(weights.qkv, layer, start), weights.qkv.shape[2]
            call(run.dot_tokens, (matrix, stride, part, x, padded, out, row))
            _bias_columns(weights.qkv_bias, layer, start, part, batch.qkv, start)
            if finish(team, chunks):
                advance(team, phase)
            chunk = take(team, phase, chunks)
        phase = wait(team, phase)

        block = take(team, phase, blocks)
        while block >= 0:
            for t in range(TOKENS * block, min(count, TOKENS * block + TOKENS)):
                place_heads(
                    run, weights, shape, layer, position + t, batch.qkv[t], batch.cos[t], batch.sin[t],
                    batch.query[t], batch.key[thread], cache,
                )  # fmt: skip
            if finish(team, blocks):
                advance(team, phase)
            block = take(team, phase, blocks)
        phase = wait(team, phase)

        block = take(team, phase, blocks)
        while block >= 0:
            for t in range(TOKENS * block, min(count, TOKENS * block + TOKENS)):
                _attend(
                    run, weights, shape, layer, position + t, cache, batch.query[t], batch.scores[thread],
                    batch.context[thread], batch.joined[t],
                )  # fmt: skip
                call(run.quantize, (attended, t))
            if finish(team, blocks):
                advance(team, phase)
            block = take(team, phase, blocks)
        phase = wait(team, phase)

        chunks = _chunks(shape.hidden, _ROWS)
        chunk = take(team, phase, chunks)
        while chunk >= 0:
            start = _ROWS * chunk
            part, out, row = min(shape.hidden - start, _ROWS), at(batch.delta) + 4 * start, 4 * batch.delta.shape[1]
            matrix, stride = row_of(weights.o, layer, start), weights.o.shape[2]
            call(run.dot_tokens, (matrix, stride, part, attended, padded, out, row))
            if finish(team, chunks):
                advance(team, phase)
            chunk = take(team, phase, chunks)
        phase = wait(team, phase)

        block = take(team, phase, blocks)
        while block >= 0:
            start, stop = TOKENS * block, min(count, TOKENS * block + TOKENS)
            biases, post_norm = weights.o_bias, weights.attn_post_norm
            _add_blocks(run, hidden, batch.delta, biases, post_norm, layer, shape, start, stop)
            _next_inputs(run, weights.ffn_norm, weights.ffn_norm_bias, layer, shape, hidden, x, start, stop)
            if finish(team, blocks):
                advance(team, phase)
            block = take(team, phase, blocks)
        phase = wait(team, phase)

        chunks = _chunks(shape.neurons, NEURONS)
        chunk = take(team, phase, chunks)
        while chunk >= 0:
            start = NEURONS * chunk
            part, gate, up = min(shape.neurons - start, NEURONS), batch.gate[thread], batch.up[thread]
            _fire(run, weights, shape, layer, start, part, x, gate, up, batch.fired)
            if finish(team, chunks):
                advance(team, phase)
            chunk = take(team, phase, chunks)
        phase = wait(team, phase)

        columns, neurons = batch.delta.shape[1], shape.neurons
        downs, stride = row_of(weights.updown, layer, 0), weights.updown.shape[2]
        if shape.gated:
            downs += weights.gate.shape[2]
        fired, row = at(batch.fired), 4 * batch.fired.shape[1]
        strip = take(team, phase, columns // STRIP)
        while strip >= 0:
            panel, out = at(batch.panel[thread]), at(batch.delta)
            sizes = (downs, stride, neurons, columns, strip, padded, fired, row, panel, out, 4 * columns)
            call(run.down_strip, sizes)
            if finish(team, columns // STRIP):
                advance(team, phase)
            strip = take(team, phase, columns // STRIP)
        phase = wait(team, phase)

        block = take(team, phase, blocks)
        while block >= 0:
            start, stop = TOKENS * block, min(count, TOKENS * block + TOKENS)
            biases, post_norm = weights.down_bias, weights.ffn_post_norm
            _add_blocks(run, hidden, batch.delta, biases, post_norm, layer, shape, start, stop)
            if layer + 1 < shape.layers:
                _next_inputs(run, weights.attn_norm, weights.attn_norm_bias, layer + 1, shape, hidden, x, start, stop)
            else:
                _next_inputs(run, weights.final_norm, weights.final_norm_bias, 0, shape, hidden, x, start, stop)
            if finish(team, blocks):
                advance(team, phase)
            block = take(team, phase, blocks)
        phase = wait(team, phase)

    rows = logits.shape[0]  # the last ones of the batch
    for word in range(7):
        batch.wanted[thread, word] = batch.x[word]
    wanted, skipped = at(batch.wanted[thread]), padded - rows
    columns, lanes = batch.x[COLUMNS // 8], batch.x[LANES // 8]
    batch.wanted[thread, VALUES // 8] += 4 * columns * skipped
    batch.wanted[thread, QUANTS // 8] += columns * skipped
    batch.wanted[thread, SCALES // 8] += 4 * lanes * skipped
    batch.wanted[thread, SUMS // 8] += 4 * lanes * skipped
    chunks = _chunks(shape.vocab, _HEAD_ROWS)
    chunk = take(team, phase, chunks)
    while chunk >= 0:
        start = _HEAD_ROWS * chunk
        part, matrix = min(shape.vocab - start, _HEAD_ROWS), row_of(weights.head, 0, start)
        out, row = at(logits) + 4 * start, 4 * shape.vocab
        call(run.table_tokens, (matrix, weights.head.shape[2], part, wanted, rows, out, row))
        if finish(team, chunks):
            advance(team, phase)
        chunk = take(team, phase, chunks)
    wait(team, phase)
