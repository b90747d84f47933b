"""One token through all layers, compiled as one function that every thread of a team runs.

A layer is four phases (see `team.py`): rows of q, k and v; attention, where a chunk is all queries of one cached head
over a range of positions; rows of o; neurons, before which some selectors have a phase of their own (see `select.py`).
The serial step that follows each is small and done by whoever finished last. In the last phase a chunk of neurons goes
through select, gather and scatter on its own (see `neurons.py`); the chunks' sums are added in a fixed order, as are
the ranges' parts. So the result is the same bits for any number of threads.
"""

from numba import types

from fewfire.kernels.attention import RANGE
from fewfire.kernels.compile import ONE, ZERO, inline, kernel, records
from fewfire.kernels.head import screened_head
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

_HEAD_CHUNKS = 4  # times as many as for the rows of other matrices

# Buffers of one token, float32 unless said: descriptors of `x` (hidden,) and `attended`, whose values are `joined`
# (heads * head_dim,); the residual stream `hidden` and what a block adds to it, `delta`; `query` (heads, head_width),
# `key` (head_width,); `parts` of the heads' attention, the ranges of one head so many bytes after those of the one
# before; `partial` (NEURON_CHUNKS, width); `cos` and `sin` (2, rope_half) of the RoPE angles. Each thread has `scores`
# (scratch of attention), `ids` int32, `gate` and `up` (longest,) of a chunk of neurons, `block` (4, BLOCK) of those
# that are scattered together, `factors` (scratch of gather_axpy). `read` int64 (layers, NEURON_CHUNKS, 3): neurons
# whose gate, up and down rows were read. For a predictor the descriptor of `hint`, whose values are `hint_values`
# (rank,); for the largest neurons `gates` (neurons,) and `least`, which they are over. For a screened head (see
# `head.py`) the descriptor of `reduced`, whose values are `screened` (screen_rank,); of each of its chunks the
# `largest` logit and, int64, how many were made `exact`; of each thread `candidates` int32 (LIST,) and their `values`.
WORK = record("""
    x attended joined hidden delta qkv query key parts parts_stride scores scores_stride partial cos sin
    ids gate up longest block factors factors_stride read
    hint hint_values gates least reduced screened largest exact candidates values
""")


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
    if take(team, phase, thread, ONE) >= 0:
        embed(model, token, position, hidden)
        set_rope(model, position, work.cos, work.sin)
        next_input(model, layers[0].attn_norm, layers[0].attn_norm_bias, hidden, x, ZERO, model.quantize)
        finish(team, ONE)
        advance(team, phase)
    phase = wait(team, phase)

    for layer in range(model.layers):
        weights = layers[layer]
        rows, chunks = (model.heads + 2 * model.kv_heads) * model.head_dim, row_chunks(team)
        while True:
            chunk = take(team, phase, thread, chunks)
            if chunk < 0:
                break
            all_rows(model, team, model.gather_dot, weights.qkv, model.qkv_stride, rows, chunk, chunks, x, work.qkv)
            if weights.early != 0:
                matrix, out = (weights.basis, weights.basis_stride), work.hint_values
                all_rows(model, team, model.gather_dot, *matrix, weights.rank, chunk, chunks, x, out)
            if finish(team, chunks):
                if weights.early != 0:
                    quantize(model.quantize, work.hint, ZERO)
                add_to(work.qkv, weights.qkv_bias, rows)
                place_heads(model, weights, cache, layer, position, work.qkv, work.cos, work.sin, work.query, work.key)
                advance(team, phase)
        phase = wait(team, phase)

        first, scores = first_seen(weights, position) // RANGE, work.scores + thread * work.scores_stride
        ranges = position // RANGE + 1 - first
        pieces = model.kv_heads * ranges
        while True:
            chunk = take(team, phase, thread, pieces)
            if chunk < 0:
                break
            kv_head, number = chunk // ranges, chunk % ranges
            at, stride = work.parts + number * part_size(model), work.parts_stride
            attend_group(
                model, weights, cache, layer, position, kv_head, first + number, work.query, scores, at, stride
            )
            if finish(team, pieces):
                _join_heads(model, ranges, work.parts, work.parts_stride, work.joined)
                quantize(model.quantize, work.attended, 0)
                advance(team, phase)
        phase = wait(team, phase)

        while True:
            chunk = take(team, phase, thread, chunks)
            if chunk < 0:
                break
            matrix, size = (weights.o, model.o_stride), model.hidden
            all_rows(model, team, model.gather_dot, *matrix, size, chunk, chunks, work.attended, delta)
            if finish(team, chunks):
                add_block(model, hidden, delta, weights.o_bias, weights.attn_post_norm)
                next_input(model, weights.ffn_norm, weights.ffn_norm_bias, hidden, x, ZERO, model.quantize)
                advance(team, phase)
        phase = wait(team, phase)

        if weights.basis != 0 and weights.early == 0:
            phase = reduce(model, team, phase, thread, weights, work)
        if weights.top >= 0:
            phase = find_top(model, team, phase, thread, weights, work)
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
        phase = wait(team, phase)

    if model.screen != 0:
        screened_head(team, phase, thread, model, work, x, logits)
    else:
        chunks = _HEAD_CHUNKS * row_chunks(team)
        while True:
            chunk = take(team, phase, thread, chunks)
            if chunk < 0:
                break
            matrix, size = (model.head, model.table_stride), model.vocab
            all_rows(model, team, model.table_dot, *matrix, size, chunk, chunks, x, logits)
            if finish(team, chunks):
                advance(team, phase)
        wait(team, phase)
