"""One token through all layers, compiled as one function that every thread of a team runs.

A layer is four phases (see `team.py`): rows of q, k and v; heads; rows of o; neurons. The serial step that follows each
is small and done by whoever finished last. In the last phase a chunk of neurons goes through select, gather and scatter
on its own: gate rows, activation, up rows, and the scaled down rows into the chunk's own y; the chunks' sums are added
in a fixed order. So the result is the same bits for any number of threads.
"""

import math
from typing import NamedTuple

import numpy as np

from fewfire.kernels.attention import attend, remember
from fewfire.kernels.compile import inline, kernel
from fewfire.kernels.gather import Activation, address, dot_range, gather_axpy, gather_dot, read_row
from fewfire.kernels.pointwise import activate, norm, quantize, rms_norm, rotate
from fewfire.kernels.team import advance, finish, take, wait

NEURON_CHUNKS = 16  # fixed, because it decides the order of additions
_ROW_CHUNKS = 12


class Shape(NamedTuple):
    """The numbers of a model that the kernels need; see `ModelConfig`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    vocab: int
    activation: int
    act_threshold: float
    act_on_up: bool
    gated: bool
    eps: float
    attention_scale: float
    embedding_scale: float


class Weights(NamedTuple):
    """All arrays of a packed model, stacked over layers. What a model does not have is an array of length 0.

    Matrices are `(layers, rows, row elements)`, see `gather.py`; `updown` rows are a neuron's up row and then its down row
    (only the down row in an ungated model). Norms and biases are float32 `(layers, elements)`. `frequencies` is
    `(2, head_dim / 2)`, RoPE's radians per position, global and local; `local` and `window` are per layer.
    """

    embed: np.ndarray
    positions: np.ndarray
    qkv: np.ndarray
    qkv_bias: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray
    o: np.ndarray
    o_bias: np.ndarray
    gate: np.ndarray
    gate_bias: np.ndarray
    updown: np.ndarray
    up_bias: np.ndarray
    down_bias: np.ndarray
    attn_norm: np.ndarray
    attn_norm_bias: np.ndarray
    attn_post_norm: np.ndarray
    ffn_norm: np.ndarray
    ffn_norm_bias: np.ndarray
    ffn_post_norm: np.ndarray
    final_norm: np.ndarray
    final_norm_bias: np.ndarray
    head: np.ndarray
    frequencies: np.ndarray
    local: np.ndarray
    window: np.ndarray


class Workspace(NamedTuple):
    """Buffers of one token, private to a team. Vectors are padded with zeros to a multiple of 64."""

    x: Activation  # (hidden,) what the next rows are multiplied with
    attended: Activation  # (heads * head_dim,)
    hidden: np.ndarray  # (hidden,) the residual stream
    delta: np.ndarray  # (hidden,) what a block adds to it
    qkv: np.ndarray  # (rows of qkv,)
    query: np.ndarray  # (heads, width of the cache)
    key: np.ndarray  # (width of the cache,)
    context: np.ndarray  # (heads, width of the cache)
    gate: np.ndarray  # (threads, neurons in a chunk, and 8 to spare)
    up: np.ndarray  # the same
    partial: np.ndarray  # (NEURON_CHUNKS, hidden)
    factors: np.ndarray  # (threads, scratch of gather_axpy)
    cos: np.ndarray  # (2, head_dim / 2) global, local
    sin: np.ndarray


@inline
def _share(chunk, chunks, count):
    """The part of range(count) that is a chunk's."""
    return count * chunk // chunks, count * (chunk + 1) // chunks


@inline
def _add_bias(biases, layer, start, stop, out):
    if biases.shape[0] > 0:
        for i in range(start, stop):
            out[i] += biases[layer, i]


@inline
def set_rope(weights, position, cos, sin):
    """cos and sin of a position's angles, both kinds of layer."""
    for kind in range(weights.frequencies.shape[0]):
        for i in range(weights.frequencies.shape[1]):
            angle = np.float32(position) * weights.frequencies[kind, i]
            cos[kind, i] = math.cos(angle)
            sin[kind, i] = math.sin(angle)


@inline
def embed(weights, shape, token, position, out):
    """The token's row of the embedding, scaled, plus the learned position where the model has them."""
    read_row(weights.embed, address(weights.embed, 0, token), shape.hidden, out)
    for i in range(shape.hidden):
        out[i] *= np.float32(shape.embedding_scale)
    if weights.positions.shape[0] > 0:
        for i in range(shape.hidden):
            out[i] += weights.positions[position, i]


@inline
def _next_input(weights, biases, layer, shape, hidden, x):
    """Norm of the residual stream, ready to be multiplied with."""
    norm(hidden, weights, biases, layer, shape.eps, shape.hidden, x.values)
    quantize(x)


@inline
def _head_vector(source, norms, layer, shape, cos, sin, out):
    """One head of q or k: normed where the model does that, rotated where it has RoPE."""
    for i in range(shape.head_dim):
        out[i] = source[i]
    if norms.shape[0] > 0:
        rms_norm(out, norms[layer], shape.eps, shape.head_dim, out)
    if cos.size > 0:
        rotate(out, cos, sin)


@inline
def place_heads(weights, shape, layer, position, qkv, cos, sin, query, key, keys, values):
    """Splits one token's q, k, v: the queries into `query`, its keys and values into the cache."""
    width = shape.head_dim
    kind = weights.local[layer]
    for head in range(shape.heads):
        _head_vector(qkv[head * width :], weights.q_norm, layer, shape, cos[kind], sin[kind], query[head])
    for head in range(shape.kv_heads):
        at = (shape.heads + head) * width
        _head_vector(qkv[at:], weights.k_norm, layer, shape, cos[kind], sin[kind], key)
        remember(keys, layer, head, position, key)
        at += shape.kv_heads * width
        for i in range(width):
            key[i] = qkv[at + i]
        remember(values, layer, head, position, key)


@inline
def first_visible(weights, layer, position):
    """The first position that a query sees in this layer."""
    window = weights.window[layer]
    return max(0, position + 1 - window) if window > 0 else 0


@inline
def add_block(hidden, delta, biases, post_norm, layer, shape):
    """hidden += the block's output, with its bias and, in sandwich models, its norm."""
    _add_bias(biases, layer, 0, shape.hidden, delta)
    if post_norm.shape[0] > 0:
        rms_norm(delta, post_norm[layer], shape.eps, shape.hidden, delta)
    for i in range(shape.hidden):
        hidden[i] += delta[i]


@inline
def _neurons(weights, shape, layer, active, x, gate, up, y, scratch):
    """Select has happened: gather gate and up of the listed neurons, scatter their down rows into y."""
    n = active.size
    gather_dot(weights.gate, layer, active, x, gate)
    if weights.gate_bias.shape[0] > 0:
        for j in range(n):
            gate[j] += weights.gate_bias[layer, active[j]]
    activate(shape.activation, shape.act_threshold, gate, n)
    down = 0
    if shape.gated:
        gather_dot(weights.updown, layer, active, x, up)
        if weights.up_bias.shape[0] > 0:
            for j in range(n):
                up[j] += weights.up_bias[layer, active[j]]
        if shape.act_on_up:
            activate(shape.activation, shape.act_threshold, up, n)
        for j in range(n):
            gate[j] *= up[j]
        down = weights.gate.shape[2] * weights.gate.itemsize
    y[:] = np.float32(0.0)
    gather_axpy(weights.updown, layer, down, active, gate, y, scratch)


@kernel
def decode(team, phase, thread, weights, shape, token, position, keys, values, scores, active, work, logits):
    """Logits of the token at `position`, whose key and value go into the cache; run by every thread of the team.

    keys, values: `(layers, kv_heads, capacity, width)`; scores: `(heads, capacity rounded up to 8)` scratch; active:
    int32 `(layers, neurons)`, the neurons to compute; logits: `(vocab,)` float32.
    """
    x, hidden = work.x, work.hidden
    chunk = take(team, phase, 1)
    if chunk >= 0:
        embed(weights, shape, token, position, hidden)
        set_rope(weights, position, work.cos, work.sin)
        _next_input(weights.attn_norm, weights.attn_norm_bias, 0, shape, hidden, x)
        finish(team, 1)
        advance(team, phase)
    phase = wait(team, phase)

    for layer in range(shape.layers):
        rows = weights.qkv.shape[1]
        chunk = take(team, phase, _ROW_CHUNKS)
        while chunk >= 0:
            start, stop = _share(chunk, _ROW_CHUNKS, rows)
            dot_range(weights.qkv, layer, start, stop, x, work.qkv)
            _add_bias(weights.qkv_bias, layer, start, stop, work.qkv)
            if finish(team, _ROW_CHUNKS):
                place_heads(
                    weights, shape, layer, position, work.qkv, work.cos, work.sin, work.query, work.key, keys, values
                )
                advance(team, phase)
            chunk = take(team, phase, _ROW_CHUNKS)
        phase = wait(team, phase)

        head = take(team, phase, shape.heads)
        while head >= 0:
            start = first_visible(weights, layer, position)
            kv_head = head * shape.kv_heads // shape.heads
            attend(
                keys, values, layer, kv_head, start, position + 1,
                work.query[head], np.float32(shape.attention_scale), scores[head], work.context[head],
            )  # fmt: skip
            for i in range(shape.head_dim):
                work.attended.values[head * shape.head_dim + i] = work.context[head, i]
            if finish(team, shape.heads):
                quantize(work.attended)
                advance(team, phase)
            head = take(team, phase, shape.heads)
        phase = wait(team, phase)

        chunk = take(team, phase, _ROW_CHUNKS)
        while chunk >= 0:
            start, stop = _share(chunk, _ROW_CHUNKS, shape.hidden)
            dot_range(weights.o, layer, start, stop, work.attended, work.delta)
            if finish(team, _ROW_CHUNKS):
                add_block(hidden, work.delta, weights.o_bias, weights.attn_post_norm, layer, shape)
                _next_input(weights.ffn_norm, weights.ffn_norm_bias, layer, shape, hidden, x)
                advance(team, phase)
            chunk = take(team, phase, _ROW_CHUNKS)
        phase = wait(team, phase)

        chunk = take(team, phase, NEURON_CHUNKS)
        while chunk >= 0:
            start, stop = _share(chunk, NEURON_CHUNKS, shape.neurons)
            _neurons(
                weights, shape, layer, active[layer, start:stop], x,
                work.gate[thread], work.up[thread], work.partial[chunk], work.factors[thread],
            )  # fmt: skip
            if finish(team, NEURON_CHUNKS):
                for i in range(shape.hidden):
                    work.delta[i] = work.partial[0, i]
                for part in range(1, NEURON_CHUNKS):
                    for i in range(shape.hidden):
                        work.delta[i] += work.partial[part, i]
                add_block(hidden, work.delta, weights.down_bias, weights.ffn_post_norm, layer, shape)
                if layer + 1 < shape.layers:
                    _next_input(weights.attn_norm, weights.attn_norm_bias, layer + 1, shape, hidden, x)
                else:
                    _next_input(weights.final_norm, weights.final_norm_bias, 0, shape, hidden, x)
                advance(team, phase)
            chunk = take(team, phase, NEURON_CHUNKS)
        phase = wait(team, phase)

    chunks = (shape.vocab + 511) // 512
    chunk = take(team, phase, chunks)
    while chunk >= 0:
        dot_range(weights.head, 0, 512 * chunk, min(shape.vocab, 512 * chunk + 512), x, logits)
        if finish(team, chunks):
            advance(team, phase)
        chunk = take(team, phase, chunks)
    wait(team, phase)
