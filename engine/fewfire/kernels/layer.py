"""What decode and prefill share: the model as the kernels see it, and the small steps between the matrices."""

import math
from typing import NamedTuple

import numpy as np

from fewfire.kernels.compile import inline
from fewfire.kernels.gather import VALUES
from fewfire.kernels.simd import call, load_i64


class Run(NamedTuple):
    """Addresses of the primitives that a model's number formats need."""

    gather_dot: int
    gather_axpy: int
    dot_tokens: int
    down_strip: int
    table_dot: int  # gather_dot and the others for the embedding and the head, which may have another format
    table_tokens: int
    table_row: int
    attend: int
    remember: int
    rms_norm: int
    layer_norm: int
    quantize: int
    rotate: int
    activate: int


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

    Matrices are bytes `(layers, rows, row bytes)`, see `gather.py`; `updown` rows are a neuron's up row and then its down
    row (only the down row in an ungated model). Norms and biases are float32 `(layers, elements)`. `frequencies` is
    `(2, head_dim / 2)`, RoPE's radians per position, global and local; `local` and `window` are per layer. `every` counts
    up from 0: the list of all rows of any matrix.
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
    every: np.ndarray


class Cache(NamedTuple):
    """Keys and values as bytes, `(layers, kv_heads, capacity, bytes of one head)`."""

    keys: np.ndarray
    values: np.ndarray


@inline
def at(array):
    """The address of an array."""
    return array.ctypes.data


@inline
def row_of(matrix, layer, row):
    """Where a row of a stacked matrix of bytes begins."""
    return matrix.ctypes.data + (layer * matrix.shape[1] + row) * matrix.shape[2]


@inline
def cell(cache, layer, head, position):
    """Where a position's key or value begins."""
    _, heads, capacity, width = cache.shape
    return cache.ctypes.data + ((layer * heads + head) * capacity + position) * width


@inline
def bias_rows(biases, layer, start, stop, out):
    """out[start:stop] += bias[start:stop], where the model has it."""
    if biases.shape[0] > 0:
        for i in range(start, stop):
            out[i] += biases[layer, i]


@inline
def add_listed(biases, layer, rows, out):
    """out[j] += bias[rows[j]], where the model has it."""
    if biases.shape[0] > 0:
        for j in range(rows.size):
            out[j] += biases[layer, rows[j]]


@inline
def set_rope(weights, position, cos, sin):
    """cos and sin of a position's angles, for both kinds of layer."""
    for kind in range(weights.frequencies.shape[0]):
        for i in range(weights.frequencies.shape[1]):
            angle = np.float32(position) * weights.frequencies[kind, i]
            cos[kind, i] = math.cos(angle)
            sin[kind, i] = math.sin(angle)


@inline
def embed(run, weights, shape, token, position, out):
    """The token's row of the embedding, scaled, plus the learned position where the model has them."""
    call(run.table_row, (row_of(weights.embed, 0, token), out.size, at(out)))
    for i in range(shape.hidden):
        out[i] *= np.float32(shape.embedding_scale)
    if weights.positions.shape[0] > 0:
        for i in range(shape.hidden):
            out[i] += weights.positions[position, i]


@inline
def next_input(run, weights, biases, layer, shape, hidden, x, t):
    """Norm of the residual stream into vector t of x, ready to be multiplied with."""
    out = load_i64(x + VALUES) + 4 * t * hidden.size
    if biases.shape[0] > 0:
        call(run.layer_norm, (at(hidden), at(weights[layer]), at(biases[layer]), shape.eps, shape.hidden, out))
    else:
        call(run.rms_norm, (at(hidden), at(weights[layer]), shape.eps, shape.hidden, out))
    call(run.quantize, (x, t))


@inline
def _head_vector(run, source, norms, layer, shape, cos, sin, out):
    """One head of q or k: normed where the model does that, rotated where it has RoPE."""
    for i in range(shape.head_dim):
        out[i] = source[i]
    if norms.shape[0] > 0:
        call(run.rms_norm, (at(out), at(norms[layer]), shape.eps, shape.head_dim, at(out)))
    if cos.size > 0:
        call(run.rotate, (at(out), at(cos), at(sin), cos.size))


@inline
def place_heads(run, weights, shape, layer, position, qkv, cos, sin, query, key, cache):
    """Splits one token's q, k, v: the queries into `query`, its keys and values into the cache."""
    width = shape.head_dim
    kind = weights.local[layer]
    for head in range(shape.heads):
        _head_vector(run, qkv[head * width :], weights.q_norm, layer, shape, cos[kind], sin[kind], query[head])
    for head in range(shape.kv_heads):
        start = (shape.heads + head) * width
        _head_vector(run, qkv[start:], weights.k_norm, layer, shape, cos[kind], sin[kind], key)
        call(run.remember, (cell(cache.keys, layer, head, position), at(key), key.size))
        start += shape.kv_heads * width
        for i in range(width):
            key[i] = qkv[start + i]
        call(run.remember, (cell(cache.values, layer, head, position), at(key), key.size))


@inline
def first_visible(weights, layer, position):
    """The first position that a query sees in this layer."""
    window = weights.window[layer]
    return max(0, position + 1 - window) if window > 0 else 0


@inline
def add_block(run, hidden, delta, biases, post_norm, layer, shape):
    """hidden += the block's output, with its bias and, in sandwich models, its norm."""
    bias_rows(biases, layer, 0, shape.hidden, delta)
    if post_norm.shape[0] > 0:
        call(run.rms_norm, (at(delta), at(post_norm[layer]), shape.eps, shape.hidden, at(delta)))
    for i in range(shape.hidden):
        hidden[i] += delta[i]
