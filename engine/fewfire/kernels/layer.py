"""What decode and prefill share: the model as the kernels see it, and the small steps between the matrices.

The kernels see records of numbers and addresses, not arrays: an array in a signature costs compile time and
a microsecond per call, and these would be some sixty. An address of 0 is something that a model does not have.
Whoever makes a record keeps the arrays alive that it points to (`engine.py`, `buffers.py`).
"""

import math

import numpy as np

from fewfire.kernels.attention import EVERYTHING, RANGE
from fewfire.kernels.axpy import BLOCK
from fewfire.kernels.compile import inline, step
from fewfire.kernels.gather import SOON, VALUES, ask_for_row
from fewfire.kernels.simd import (
    add,
    call,
    load_f32,
    load_f32x8,
    load_i32,
    load_i64,
    mul,
    splat_f32,
    store_f32,
    store_f32x8,
    store_i32,
    where_over,
)
from fewfire.kernels.team import REGIONS, region_of


def record(integers: str, floats: str = "") -> np.dtype:
    """A record type with these int64 and float64 fields."""
    return np.dtype([(n, np.int64) for n in integers.split()] + [(n, np.float64) for n in floats.split()])


# Primitives for the model's number formats; "table" is the embedding and the head, which may have another format. The
# quantizers are 0 for f32 and bf16 rows, `layer_norm` where no norm has a bias. `attend` takes four queries,
# `attend_rest` the heads of a group that are left. Steps that only some selections need are 0 where nothing in the
# records asks for them (see `selectors/steps.py`).
_PRIMITIVES = """
    gather_dot gather_axpy dot_tokens down_strip table_dot table_tokens table_row
    attend attend_rest merge settle remember rms_norm layer_norm quantize table_quantize rotate activate
"""
_STEPS = "keep scatter_kept find_top predict reduce column_chunk join_chunks all_gates leave_out "
# `width` is the hidden size padded to 64, `head_width` head_dim padded to 8, `cell` the bytes of one cached head.
_SHAPE = """
    layers hidden width heads kv_heads head_dim head_width cell neurons vocab activation act_on_up gated norm_relu
"""
# Rows are `stride` bytes apart; a neuron's down row begins `down` bytes into its row of `updown`. `every` is the list
# of all rows of any matrix, and some more for kernels to look ahead to; `frequencies` float32 (2, head_dim / 2):
# radians per position of global and local layers; `table_integer` the bytes of one quant of a vector that meets the
# tables' rows; `qkv_column` and so on the bytes of a column of a projection (see `columns.py`). Those of a
# screened head (see `head.py`) are 0 if there is none.
_TABLES = """
    embed positions head table_stride qkv_stride o_stride gate_stride updown_stride down
    final_norm final_norm_bias frequencies rope_half every table_integer qkv_column o_column ffn_column
"""
_SCREEN = """
    screened_logits dot_codes screen screen_stride screen_scales screen_basis screen_centre screen_bias screen_rank
"""
MODEL = record(_PRIMITIVES + _STEPS + _SHAPE + _TABLES + _SCREEN, "eps attention_scale embedding_scale screen_margin")

# One layer: `act_threshold` are the neurons' thresholds of the activation function, `act_centre` their centres (see
# `pointwise.activate`), `bypass` (hidden,) rows, in the tables' format, whose products with the FFN's input are added
# to its output. `local` says whether it uses the local RoPE, `window` what it sees. `qkv_columns` and so on are
# projections by columns, 0 where they are read by rows, and `qkv_least` their inputs' thresholds (see `columns.py`).
# What its FFN may leave out (see `select.py`): `active` lists its neurons, group by group of `group_size`; `predictor`
# are rows that score the `groups`, `predictor_bias` is added to that; they meet `rank` rows of `basis` times x, or x
# where there are none. `gate_least` and `down_least` are the neurons' thresholds, `top` is how many are kept, or -1.
# Addresses are 0 where nothing is dropped.
LAYER = record(
    """
    qkv qkv_bias q_norm k_norm o o_bias gate gate_bias updown up_bias down_bias act_threshold act_centre bypass
    attn_norm attn_norm_bias attn_post_norm ffn_norm ffn_norm_bias ffn_post_norm local window active
    qkv_columns qkv_least o_columns o_least ffn_columns ffn_least
    predictor predictor_stride predictor_bias groups group_size basis basis_stride rank
    gate_least down_least top
    """
)

# One session's keys and values: (layers, kv_heads, capacity) cells each. `kept`, uint8 (layers, neurons), says which
# neurons are read in any case, because they were for a token shortly before; 0 where that is no reason.
CACHE = record("keys values capacity kept")


@inline
def pad(ids, size):
    """What kernels look ahead to behind a list: its last entry."""
    for i in range(size, size + BLOCK):
        store_i32(ids + 4 * i, load_i32(ids + 4 * size - 4))


@inline
def begin_block(matrix, stride, wanted, ids, count):
    """Asks at once for the first rows of a list that is worked on in order, block by block (see `axpy.py`)."""
    for i in range(min(count, BLOCK)):
        ask_for_row(matrix + stride * load_i32(ids + 4 * i), wanted)


@inline
def row_chunks(team):
    """Chunks that the rows of a matrix are shared out in.

    Few, since streams begin anew with each (perf/LOG.md, "chunks that go on where the last one ended").
    """
    return 4 * team[REGIONS]


@inline
def all_rows(model, team, dot, matrix, stride, count, chunk, chunks, x, out):
    """A chunk of the rows of a matrix: a piece of each quarter of its region (see `gather.py`)."""
    first, end = region_of(team, chunk, chunks)
    start, stop = count * first // chunks, count * end // chunks
    quarter, rows = (stop - start + 3) // 4, model.every + 4 * start
    piece = quarter * (chunk - first) // (end - first), quarter * (chunk - first + 1) // (end - first)
    call(dot, (matrix, stride, rows, rows + 4 * SOON, stride, stop - start, piece[0], piece[1], x, out + 4 * start))


@inline
def head_cache(base, cache, model, layer, head):
    """Where a head's cells begin; `base` is `cache.keys` or `cache.values`."""
    return base + (layer * model.kv_heads + head) * cache.capacity * model.cell


@step
def add_to(target, source, count):
    """target[:count] += source[:count]; float32 at addresses. Does nothing when the source is 0."""
    if source != 0:
        whole = count - count % 8
        for i in range(0, 4 * whole, 32):
            store_f32x8(target + i, add(load_f32x8(target + i), load_f32x8(source + i)))
        for i in range(4 * whole, 4 * count, 4):
            store_f32(target + i, load_f32(target + i) + load_f32(source + i))


@inline
def clear(target, count):
    """target[:count] = 0, and up to 7 elements past the end."""
    for i in range(0, 4 * count, 32):
        store_f32x8(target + i, splat_f32(0.0))


@inline
def multiply_by(target, source, count):
    """target[:count] *= source[:count], and up to 7 elements past the end."""
    for i in range(0, 4 * count, 32):
        store_f32x8(target + i, mul(load_f32x8(target + i), load_f32x8(source + i)))


@inline
def copy(target, source, count):
    """target[:count] = source[:count]."""
    for i in range(0, 4 * count, 4):
        store_f32(target + i, load_f32(source + i))


@step
def set_rope(model, position, cos, sin):
    """cos and sin of a position's angles, `(2, head_dim / 2)`, for both kinds of layer."""
    for i in range(0, 8 * model.rope_half, 4):
        angle = np.float32(position) * load_f32(model.frequencies + i)
        store_f32(cos + i, math.cos(angle))
        store_f32(sin + i, math.sin(angle))


@step
def embed(model, token, position, out):
    """The token's row of the embedding, scaled, plus the learned position where the model has them."""
    call(model.table_row, (model.embed + token * model.table_stride, model.width, out))
    scale = splat_f32(model.embedding_scale)
    for i in range(0, 4 * model.width, 32):
        store_f32x8(out + i, mul(load_f32x8(out + i), scale))
    if model.positions != 0:
        add_to(out, model.positions + 4 * position * model.hidden, model.hidden)


@step
def quantize(address, x, t):
    """Vector t of x as integers, for rows whose format wants that."""
    if address != 0:
        call(address, (x, t))


@step
def next_input(model, weight, bias, hidden, x, t, quantizer):
    """Norm of the residual stream into vector t of x, ready to be multiplied with rows of the quantizer's format.

    Models with ReLUs there have none after the final norm.
    """
    out = load_i64(x + VALUES) + 4 * t * model.width
    if bias != 0:
        call(model.layer_norm, (hidden, weight, bias, model.eps, model.hidden, out))
    else:
        call(model.rms_norm, (hidden, weight, model.eps, model.hidden, out))
    if model.norm_relu != 0 and weight != model.final_norm:
        for i in range(0, 4 * model.width, 32):
            store_f32x8(out + i, where_over(load_f32x8(out + i), splat_f32(0.0)))
    quantize(quantizer, x, t)


@inline
def _place_head(model, source, norm, cos, sin, out):
    """One head of q or k: normed where the model does that, rotated where it has RoPE."""
    copy(out, source, model.head_dim)
    if norm != 0:
        call(model.rms_norm, (out, norm, model.eps, model.head_dim, out))
    if model.rope_half > 0:
        call(model.rotate, (out, cos, sin, model.rope_half))


@step
def place_heads(model, weights, cache, layer, position, qkv, cos, sin, query, key):
    """Splits one token's q, k, v: the queries into `query`, its keys and values into the cache; `key` is scratch."""
    size, width = 4 * model.head_dim, model.head_width
    cos, sin = cos + 4 * weights.local * model.rope_half, sin + 4 * weights.local * model.rope_half
    for head in range(model.heads):
        _place_head(model, qkv + head * size, weights.q_norm, cos, sin, query + 4 * head * width)
    for head in range(model.kv_heads):
        source, at = qkv + (model.heads + head) * size, position * model.cell
        _place_head(model, source, weights.k_norm, cos, sin, key)
        call(model.remember, (head_cache(cache.keys, cache, model, layer, head) + at, key, width))
        copy(key, source + model.kv_heads * size, model.head_dim)
        call(model.remember, (head_cache(cache.values, cache, model, layer, head) + at, key, width))


@inline
def first_seen(weights, position):
    """The first position that a token at `position` sees."""
    return max(0, position + 1 - weights.window) if weights.window > 0 else 0


@inline
def part_size(model):
    """Bytes of what a query has found in some range of positions (see `attention.py`)."""
    return 4 * (model.head_width + 8)


@step
def attend_group(model, weights, cache, layer, position, kv_head, number, query, scores, parts, stride):
    """One token's queries of one cached head over range `number`; the heads' parts are `stride` bytes apart."""
    keys = head_cache(cache.keys, cache, model, layer, kv_head)
    values = head_cache(cache.values, cache, model, layer, kv_head)
    start, stop = max(first_seen(weights, position), RANGE * number), min(position + 1, RANGE * (number + 1))
    group, size, scale = model.heads // model.kv_heads, 4 * model.head_width, model.attention_scale
    for head in range(group * kv_head, group * (kv_head + 1), 4):
        attend = model.attend if group * (kv_head + 1) - head >= 4 else model.attend_rest
        seen, out = (start, stop, stop, EVERYTHING), parts + head * stride
        call(attend, (keys, values, *seen, query + head * size, size, scale, scores, out, stride, model.head_width))


@inline
def _attend_tokens(model, weights, cache, layer, position, count, head, number, query, scores, out):
    """One head's queries of four tokens from `position` on, of which `count` are there, over range `number`."""
    kv_head = head * model.kv_heads // model.heads
    keys = head_cache(cache.keys, cache, model, layer, kv_head)
    values = head_cache(cache.values, cache, model, layer, kv_head)
    start, stop = max(first_seen(weights, position), RANGE * number), min(position + count, RANGE * (number + 1))
    size, window = 4 * model.head_width, weights.window if weights.window > 0 else EVERYTHING
    seen, query, scale = (start, stop, position + 1, window), query + head * size, model.attention_scale
    width = model.head_width
    call(model.attend, (keys, values, *seen, query, model.heads * size, scale, scores, out, part_size(model), width))


@step
def attend_block(model, weights, cache, layer, position, count, query, scores, parts, joined, joined_stride):
    """Up to four tokens' attention, from their queries to the joined heads.

    `parts` is scratch for 4 * (group + 1) parts: those of the ranges so far, and those of one more range.
    """
    group, part = model.heads // model.kv_heads, part_size(model)
    other = parts + 4 * group * part
    for kv_head in range(model.kv_heads):
        first = first_seen(weights, position) // RANGE
        for number in range(first, (position + count - 1) // RANGE + 1):
            for member in range(group):  # the heads of a group meet the range while it is in the first-level cache
                head, ours = group * kv_head + member, parts + 4 * member * part
                out = ours if number == first else other
                _attend_tokens(model, weights, cache, layer, position, count, head, number, query, scores, out)
                if number > first:
                    for t in range(count):
                        _join(model, weights, position + t, number, ours + t * part, other + t * part)
        for member in range(group):
            for t in range(count):
                out = joined + t * joined_stride + 4 * (group * kv_head + member) * model.head_dim
                call(model.settle, (parts + (4 * member + t) * part, model.head_width, model.head_dim, out))


@inline
def _join(model, weights, position, number, part, other):
    """Adds a token's part over range `number` to the one over the ranges before it, if it sees any of them."""
    first = first_seen(weights, position) // RANGE
    if first == number:
        copy(part, other, model.head_width + 8)
    elif first < number <= position // RANGE:
        call(model.merge, (part, other, model.head_width))


@step
def add_block(model, hidden, delta, bias, post_norm):
    """hidden += the block's output, with its bias and, in sandwich models, its norm."""
    add_to(delta, bias, model.hidden)
    if post_norm != 0:
        call(model.rms_norm, (delta, post_norm, model.eps, model.hidden, delta))
    add_to(hidden, delta, model.hidden)
