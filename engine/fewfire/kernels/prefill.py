"""A batch of tokens through all layers: the same phases as `decode.py`, with matrix products instead of single rows.

All neurons are computed: between them, the tokens of a batch use nearly all.
"""

from typing import NamedTuple

import numpy as np

from fewfire.kernels.attention import attend
from fewfire.kernels.compile import inline, kernel
from fewfire.kernels.decode import add_block, embed, first_visible, place_heads, set_rope
from fewfire.kernels.dense import STRIP, TOKENS, dot_tokens, down_strip
from fewfire.kernels.gather import Activation
from fewfire.kernels.pointwise import activate, norm, quantize
from fewfire.kernels.team import advance, finish, take, wait

NEURONS = 16  # neurons of a chunk
_ROWS = 16  # rows of a chunk


class Batch(NamedTuple):
    """Buffers of one batch; the number of tokens is a multiple of 4. Those of the last line are one per thread."""

    x: Activation  # (tokens, hidden)
    attended: Activation  # (tokens, heads * head_dim)
    hidden: np.ndarray  # (tokens, hidden)
    delta: np.ndarray  # (tokens, hidden)
    qkv: np.ndarray  # (tokens, rows of qkv)
    query: np.ndarray  # (tokens, heads, width of the cache)
    fired: np.ndarray  # (tokens, neurons) act(gate) * up
    gate: np.ndarray  # (threads, tokens, NEURONS)
    up: np.ndarray  # (threads, tokens, NEURONS)
    panel: np.ndarray  # (threads, 64 * 64)
    key: np.ndarray  # (threads, width of the cache)
    context: np.ndarray  # (threads, width of the cache)
    scores: np.ndarray  # (threads, capacity rounded up to 8)
    cos: np.ndarray  # (threads, 2, head_dim / 2)
    sin: np.ndarray


@inline
def _token(x, t):
    return Activation(x.values[t], x.quants[t], x.scales[t], x.sums[t], x.scratch[t])


@inline
def _chunks(count, size):
    return (count + size - 1) // size


@inline
def _next_inputs(weights, biases, layer, shape, hidden, x, start, stop):
    for t in range(start, stop):
        row = _token(x, t)
        norm(hidden[t], weights, biases, layer, shape.eps, shape.hidden, row.values)
        quantize(row)


@inline
def _bias_columns(biases, layer, start, stop, out, shift):
    if biases.shape[0] > 0:
        for t in range(out.shape[0]):
            for i in range(start, stop):
                out[t, i - shift] += biases[layer, i]


@inline
def _fire(weights, shape, layer, start, stop, x, gate, up, fired):
    """act(gate) * up of some neurons, all tokens."""
    n = stop - start
    dot_tokens(weights.gate, layer, start, stop, x, gate, start)
    _bias_columns(weights.gate_bias, layer, start, stop, gate, start)
    if shape.gated:
        dot_tokens(weights.updown, layer, start, stop, x, up, start)
        _bias_columns(weights.up_bias, layer, start, stop, up, start)
    for t in range(x.quants.shape[0]):
        activate(shape.activation, shape.act_threshold, gate[t], n)
        if shape.act_on_up:
            activate(shape.activation, shape.act_threshold, up[t], n)
        for j in range(n):
            fired[t, start + j] = gate[t, j] * up[t, j] if shape.gated else gate[t, j]


@kernel
def prefill(team, phase, thread, weights, shape, tokens, position, keys, values, batch, first_logits, logits):
    """The tokens from `position` on; their keys and values go into the cache; run by every thread of the team.

    tokens: int32; first_logits: the first token of the batch whose logits are wanted; logits: (tokens of the batch -
    first_logits, vocab) float32. Other arguments as in `decode`.
    """
    count, x, hidden = tokens.size, batch.x, batch.hidden
    blocks = _chunks(count, TOKENS)

    block = take(team, phase, blocks)
    while block >= 0:
        start, stop = TOKENS * block, min(count, TOKENS * block + TOKENS)
        for t in range(start, stop):
            embed(weights, shape, tokens[t], position + t, hidden[t])
        _next_inputs(weights.attn_norm, weights.attn_norm_bias, 0, shape, hidden, x, start, stop)
        if finish(team, blocks):
            advance(team, phase)
        block = take(team, phase, blocks)
    phase = wait(team, phase)

    for layer in range(shape.layers):
        rows = weights.qkv.shape[1]
        chunks = _chunks(rows, _ROWS)
        chunk = take(team, phase, chunks)
        while chunk >= 0:
            start, stop = _ROWS * chunk, min(rows, _ROWS * chunk + _ROWS)
            dot_tokens(weights.qkv, layer, start, stop, x, batch.qkv, 0)
            _bias_columns(weights.qkv_bias, layer, start, stop, batch.qkv, 0)
            if finish(team, chunks):
                advance(team, phase)
            chunk = take(team, phase, chunks)
        phase = wait(team, phase)

        block = take(team, phase, blocks)
        while block >= 0:
            for t in range(TOKENS * block, min(count, TOKENS * block + TOKENS)):
                set_rope(weights, position + t, batch.cos[thread], batch.sin[thread])
                place_heads(
                    weights, shape, layer, position + t, batch.qkv[t], batch.cos[thread], batch.sin[thread],
                    batch.query[t], batch.key[thread], keys, values,
                )  # fmt: skip
            if finish(team, blocks):
                advance(team, phase)
            block = take(team, phase, blocks)
        phase = wait(team, phase)

        block = take(team, phase, blocks)
        while block >= 0:
            for t in range(TOKENS * block, min(count, TOKENS * block + TOKENS)):
                row = _token(batch.attended, t)
                start = first_visible(weights, layer, position + t)
                for head in range(shape.heads):
                    kv_head = head * shape.kv_heads // shape.heads
                    attend(
                        keys, values, layer, kv_head, start, position + t + 1, batch.query[t, head],
                        np.float32(shape.attention_scale), batch.scores[thread], batch.context[thread],
                    )  # fmt: skip
                    for i in range(shape.head_dim):
                        row.values[head * shape.head_dim + i] = batch.context[thread, i]
                quantize(row)
            if finish(team, blocks):
                advance(team, phase)
            block = take(team, phase, blocks)
        phase = wait(team, phase)

        chunks = _chunks(shape.hidden, _ROWS)
        chunk = take(team, phase, chunks)
        while chunk >= 0:
            start, stop = _ROWS * chunk, min(shape.hidden, _ROWS * chunk + _ROWS)
            dot_tokens(weights.o, layer, start, stop, batch.attended, batch.delta, 0)
            if finish(team, chunks):
                advance(team, phase)
            chunk = take(team, phase, chunks)
        phase = wait(team, phase)

        block = take(team, phase, blocks)
        while block >= 0:
            start, stop = TOKENS * block, min(count, TOKENS * block + TOKENS)
            for t in range(start, stop):
                add_block(hidden[t], batch.delta[t], weights.o_bias, weights.attn_post_norm, layer, shape)
            _next_inputs(weights.ffn_norm, weights.ffn_norm_bias, layer, shape, hidden, x, start, stop)
            if finish(team, blocks):
                advance(team, phase)
            block = take(team, phase, blocks)
        phase = wait(team, phase)

        chunks = _chunks(shape.neurons, NEURONS)
        chunk = take(team, phase, chunks)
        while chunk >= 0:
            start, stop = NEURONS * chunk, min(shape.neurons, NEURONS * chunk + NEURONS)
            _fire(weights, shape, layer, start, stop, x, batch.gate[thread], batch.up[thread], batch.fired)
            if finish(team, chunks):
                advance(team, phase)
            chunk = take(team, phase, chunks)
        phase = wait(team, phase)

        columns = batch.delta.shape[1]
        down = weights.gate.shape[2] * weights.gate.itemsize if shape.gated else 0
        strip = take(team, phase, columns // STRIP)
        while strip >= 0:
            down_strip(weights.updown, layer, down, columns, strip, batch.fired, batch.panel[thread], batch.delta)
            if finish(team, columns // STRIP):
                advance(team, phase)
            strip = take(team, phase, columns // STRIP)
        phase = wait(team, phase)

        block = take(team, phase, blocks)
        while block >= 0:
            start, stop = TOKENS * block, min(count, TOKENS * block + TOKENS)
            for t in range(start, stop):
                add_block(hidden[t], batch.delta[t], weights.down_bias, weights.ffn_post_norm, layer, shape)
            if layer + 1 < shape.layers:
                _next_inputs(weights.attn_norm, weights.attn_norm_bias, layer + 1, shape, hidden, x, start, stop)
            else:
                _next_inputs(weights.final_norm, weights.final_norm_bias, 0, shape, hidden, x, start, stop)
            if finish(team, blocks):
                advance(team, phase)
            block = take(team, phase, blocks)
        phase = wait(team, phase)

    first = first_logits // TOKENS * TOKENS
    wanted = Activation(x.values[first:], x.quants[first:], x.scales[first:], x.sums[first:], x.scratch[first:])
    chunks = _chunks(shape.vocab, 64)
    chunk = take(team, phase, chunks)
    while chunk >= 0:
        start, stop = 64 * chunk, min(shape.vocab, 64 * chunk + 64)
        dot_tokens(weights.head, 0, start, stop, wanted, logits, 0)
        if finish(team, chunks):
            advance(team, phase)
        chunk = take(team, phase, chunks)
    wait(team, phase)
