"""One token through all layers, compiled as one function that every thread of a team runs.

A layer is four phases (see `team.py`): rows of q, k and v; heads; rows of o; neurons. The serial step that follows each
is small and done by whoever finished last. In the last phase a chunk of neurons goes through select, gather and scatter
on its own: gate rows, activation, up rows, and the scaled down rows into the chunk's own y; the chunks' sums are added
in a fixed order. So the result is the same bits for any number of threads.
"""

from fewfire.kernels.compile import inline, kernel
from fewfire.kernels.layer import (
    add_block,
    add_listed,
    at,
    bias_rows,
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

NEURON_CHUNKS = 16  # fixed, because it decides the order of additions
_ROW_CHUNKS = 12
_HEAD_ROWS = 512  # rows of the output head in a chunk


@inline
def _share(chunk, chunks, count):
    """The part of range(count) that is a chunk's."""
    return count * chunk // chunks, count * (chunk + 1) // chunks


@inline
def _neurons(run, weights, shape, layer, active, x, gate, up, y, scratch):
    """Select has happened: gather gate and up of the listed neurons, scatter their down rows into y."""
    n, rows = active.size, at(active)
    call(run.gather_dot, (row_of(weights.gate, layer, 0), weights.gate.shape[2], rows, n, x, at(gate)))
    add_listed(weights.gate_bias, layer, active, gate)
    call(run.activate, (shape.activation, shape.act_threshold, at(gate), n))
    updown, stride, down = row_of(weights.updown, layer, 0), weights.updown.shape[2], 0
    if shape.gated:
        call(run.gather_dot, (updown, stride, rows, n, x, at(up)))
        add_listed(weights.up_bias, layer, active, up)
        if shape.act_on_up:
            call(run.activate, (shape.activation, shape.act_threshold, at(up), n))
        for j in range(n):
            gate[j] *= up[j]
        down = weights.gate.shape[2]
    y[:] = 0.0
    call(run.gather_axpy, (updown + down, stride, rows, n, at(gate), at(y), y.size, at(scratch)))


@kernel
def decode(team, phase, thread, run, weights, shape, token, position, cache, scores, active, work, logits):
    """Logits of the token at `position`, whose key and value go into the cache; run by every thread of the team.

    scores: `(heads, capacity + 8)` scratch; active: int32 `(layers, neurons)`, the neurons to compute; logits: `(vocab,)`
    float32. Other arguments as in `layer.py`.
    """
    hidden = work.hidden
    x, attended = at(work.x), at(work.attended)
    if take(team, phase, 1) >= 0:
        embed(run, weights, shape, token, position, hidden)
        set_rope(weights, position, work.cos, work.sin)
        next_input(run, weights.attn_norm, weights.attn_norm_bias, 0, shape, hidden, x, 0)
        finish(team, 1)
        advance(team, phase)
    phase = wait(team, phase)

    for layer in range(shape.layers):
        chunk = take(team, phase, _ROW_CHUNKS)
        while chunk >= 0:
            start, stop = _share(chunk, _ROW_CHUNKS, weights.qkv.shape[1])
            out, rows = at(work.qkv) + 4 * start, at(weights.every) + 4 * start
            matrix, stride = row_of(weights.qkv, layer, 0), weights.qkv.shape[2]
            call(run.gather_dot, (matrix, stride, rows, stop - start, x, out))
            bias_rows(weights.qkv_bias, layer, start, stop, work.qkv)
            if finish(team, _ROW_CHUNKS):
                place_heads(
                    run, weights, shape, layer, position, work.qkv, work.cos, work.sin, work.query, work.key, cache
                )
                advance(team, phase)
            chunk = take(team, phase, _ROW_CHUNKS)
        phase = wait(team, phase)

        head = take(team, phase, shape.heads)
        while head >= 0:
            kv_head, out = head * shape.kv_heads // shape.heads, work.context[head]
            keys, values = cell(cache.keys, layer, kv_head, 0), cell(cache.values, layer, kv_head, 0)
            start, stop = first_visible(weights, layer, position), position + 1
            query, scale = at(work.query[head]), shape.attention_scale
            call(run.attend, (keys, values, start, stop, query, scale, at(scores[head]), at(out), out.size))
            for i in range(shape.head_dim):
                work.joined[head * shape.head_dim + i] = out[i]
            if finish(team, shape.heads):
                call(run.quantize, (attended, 0))
                advance(team, phase)
            head = take(team, phase, shape.heads)
        phase = wait(team, phase)

        chunk = take(team, phase, _ROW_CHUNKS)
        while chunk >= 0:
            start, stop = _share(chunk, _ROW_CHUNKS, shape.hidden)
            out, rows = at(work.delta) + 4 * start, at(weights.every) + 4 * start
            call(run.gather_dot, (row_of(weights.o, layer, 0), weights.o.shape[2], rows, stop - start, attended, out))
            if finish(team, _ROW_CHUNKS):
                add_block(run, hidden, work.delta, weights.o_bias, weights.attn_post_norm, layer, shape)
                next_input(run, weights.ffn_norm, weights.ffn_norm_bias, layer, shape, hidden, x, 0)
                advance(team, phase)
            chunk = take(team, phase, _ROW_CHUNKS)
        phase = wait(team, phase)

        chunk = take(team, phase, NEURON_CHUNKS)
        while chunk >= 0:
            start, stop = _share(chunk, NEURON_CHUNKS, shape.neurons)
            gate, up, scratch = work.gate[thread], work.up[thread], work.factors[thread]
            _neurons(run, weights, shape, layer, active[layer, start:stop], x, gate, up, work.partial[chunk], scratch)
            if finish(team, NEURON_CHUNKS):
                work.delta[:] = work.partial[0]
                for part in range(1, NEURON_CHUNKS):
                    for i in range(shape.hidden):
                        work.delta[i] += work.partial[part, i]
                add_block(run, hidden, work.delta, weights.down_bias, weights.ffn_post_norm, layer, shape)
                if layer + 1 < shape.layers:
                    next_input(run, weights.attn_norm, weights.attn_norm_bias, layer + 1, shape, hidden, x, 0)
                else:
                    next_input(run, weights.final_norm, weights.final_norm_bias, 0, shape, hidden, x, 0)
                advance(team, phase)
            chunk = take(team, phase, NEURON_CHUNKS)
        phase = wait(team, phase)

    chunks = (shape.vocab + _HEAD_ROWS - 1) // _HEAD_ROWS
    chunk = take(team, phase, chunks)
    while chunk >= 0:
        start, stop = _HEAD_ROWS * chunk, min(shape.vocab, _HEAD_ROWS * chunk + _HEAD_ROWS)
        out, rows = at(logits) + 4 * start, at(weights.every) + 4 * start
        call(run.table_dot, (row_of(weights.head, 0, 0), weights.head.shape[2], rows, stop - start, x, out))
        if finish(team, chunks):
            advance(team, phase)
        chunk = take(team, phase, chunks)
    wait(team, phase)
