"""The output head of one token: every logit, or a cheap screen of all and the exact logits of those that may matter.

The screen is the head in two bits a weight: logits = rows (basis x) + bias + centre x, where the centre is the mean row
of the head and the basis puts first what matters most (rows and basis x: `codes.py`). Tokens to which these give a
probability of exp(-margin) or more are candidates: their rows of the head are read. The others keep the screened logit,
so that there is always a whole distribution. How a screen is fitted, and what it costs, is not known here
(`selectors/screen.py`).

Three phases: rows of the basis; screened logits, of each chunk with their largest and the sum of their exponentials;
candidates, which each chunk looks for among its own tokens. The chunks are the same for any number of threads, and so
are all results.
"""

import math

import numpy as np
from numba import types

from fewfire.kernels.axpy import BLOCK
from fewfire.kernels.codes import narrow
from fewfire.kernels.compile import inline, primitive, step
from fewfire.kernels.counters import add_up
from fewfire.kernels.gather import SOON
from fewfire.kernels.layer import all_rows, pad, row_chunks
from fewfire.kernels.pointwise import exp
from fewfire.kernels.simd import (
    add,
    call,
    fma,
    load_f32,
    load_f32x8,
    load_i32,
    max_lane,
    maximum,
    mul,
    splat_f32,
    store_f32,
    store_f32x8,
    store_i32,
    store_i64,
    subtract,
    sum_lanes,
)
from fewfire.kernels.team import advance, finish, take, wait
from fewfire.kernels.work import A_PHASE, HEAD_CHUNKS, THE_MODEL, THE_WORK

_HEAD_CHUNKS = 4  # times as many as for the rows of other matrices
_LISTED = 256  # candidates that are computed together
LIST = _LISTED + BLOCK  # entries of a thread's list of candidates


@inline
def _part(model, chunk):
    """The first token of a chunk, and the first behind it."""
    return model.vocab * chunk // HEAD_CHUNKS, model.vocab * (chunk + 1) // HEAD_CHUNKS


@step
def _screen_part(model, start, stop, work, logits):
    """The screened logits of tokens start to stop; returns the largest, and the sum of exp(logit - largest)."""
    shift, unit, above = load_f32(work.affine), load_f32(work.affine + 4), load_f32(work.affine + 8)
    largest, total, count = np.float32(-np.inf), np.float32(0.0), stop - start
    if count > 0:
        codes = model.screen + model.screen_stride * start
        call(model.dot_codes, (codes, model.screen_stride, count, work.reduced, logits + 4 * start))
        whole, best, sums = start + count // 8 * 8, splat_f32(largest), splat_f32(total)
        for i in range(4 * start, 4 * whole, 32):
            level = mul(subtract(load_f32x8(logits + i), splat_f32(above)), splat_f32(unit))
            bias = add(load_f32x8(model.screen_bias + i), splat_f32(shift))
            values = fma(level, load_f32x8(model.screen_scales + i), bias)
            store_f32x8(logits + i, values)
            best = maximum(values, best)
        largest = max_lane(best)
        for i in range(4 * whole, 4 * stop, 4):
            level = (load_f32(logits + i) - above) * unit
            value = level * load_f32(model.screen_scales + i) + (load_f32(model.screen_bias + i) + shift)
            store_f32(logits + i, value)
            largest = max(value, largest)
        for i in range(4 * start, 4 * whole, 32):
            sums = add(sums, exp(subtract(load_f32x8(logits + i), splat_f32(largest))))
        total = sum_lanes(sums)
        for i in range(4 * whole, 4 * stop, 4):
            total += math.exp(load_f32(logits + i) - largest)
    return largest, total


@step
def _log_total(largest, totals):
    """log sum exp of all screened logits."""
    best, total = np.float32(-np.inf), np.float32(0.0)
    for i in range(0, 4 * HEAD_CHUNKS, 4):
        best = max(best, load_f32(largest + i))
    for i in range(0, 4 * HEAD_CHUNKS, 4):
        total += load_f32(totals + i) * math.exp(load_f32(largest + i) - best)
    return best + np.float32(math.log(total))


@inline
def _exact(model, ids, count, x, values, logits):
    """The exact logits of the listed tokens."""
    pad(ids, count)
    stride = model.table_stride
    listed = (ids, ids + 4 * SOON, stride, count, 0, (count + 3) // 4)
    call(model.table_dot, (model.head, stride, *listed, x, values))
    for i in range(0, 4 * count, 4):
        store_f32(logits + 4 * load_i32(ids + i), load_f32(values + i))


@step
def _exact_part(model, start, stop, least, x, ids, values, logits):
    """Exact logits for the candidates among tokens start to stop; returns how many there are."""
    found, listed = 0, 0
    for first in range(start, stop, 8):
        if first + 8 > stop or max_lane(load_f32x8(logits + 4 * first)) >= least:  # of most eights none is
            for token in range(first, min(first + 8, stop)):
                store_i32(ids + 4 * listed, token)
                listed += load_f32(logits + 4 * token) >= least
        if listed > _LISTED - 8 or (first + 8 >= stop and listed > 0):
            _exact(model, ids, listed, x, values, logits)
            found, listed = found + listed, 0
    return found


@step
def all_logits(model, team, phase, thread, work, logits):
    """Logits `(vocab,)` of the final hidden state, all of them exact."""
    chunks = _HEAD_CHUNKS * row_chunks(team)
    while True:
        chunk = take(team, phase, thread, chunks)
        if chunk < 0:
            break
        matrix, size = (model.head, model.table_stride), model.vocab
        all_rows(model, team, model.table_dot, *matrix, size, chunk, chunks, work.x, logits)
        if finish(team, chunks):
            add_up(model, work)
            advance(team, phase)
    wait(team, phase)


@primitive(THE_MODEL, *A_PHASE, THE_WORK, types.int64)
def screened_logits(model, team, phase, thread, work, logits):
    """Logits `(vocab,)` of the final hidden state through the screen; leaves how many were exact in `work.exact`."""
    chunks = row_chunks(team)
    while True:
        chunk = take(team, phase, thread, chunks)
        if chunk < 0:
            break
        matrix, size = (model.screen_basis, model.table_stride), model.screen_rank
        all_rows(model, team, model.table_dot, *matrix, size, chunk, chunks, work.x, work.inner)
        if finish(team, chunks):
            rows, stride = model.every, model.table_stride
            call(model.table_dot, (model.screen_centre, stride, rows, rows, stride, 1, 0, 1, work.x, work.affine))
            narrow(work.inner, model.screen_rank, work.reduced, work.affine + 4)
            advance(team, phase)
    phase = wait(team, phase)

    while True:
        chunk = take(team, phase, thread, HEAD_CHUNKS)
        if chunk < 0:
            break
        start, stop = _part(model, chunk)
        largest, total = _screen_part(model, start, stop, work, logits)
        store_f32(work.largest + 4 * chunk, largest)
        store_f32(work.totals + 4 * chunk, total)
        if finish(team, HEAD_CHUNKS):
            store_f32(work.least, _log_total(work.largest, work.totals) - np.float32(model.screen_margin))
            advance(team, phase)
    phase = wait(team, phase)

    least = load_f32(work.least)
    ids, values = work.candidates + 4 * LIST * thread, work.values + 4 * LIST * thread
    while True:
        chunk = take(team, phase, thread, HEAD_CHUNKS)
        if chunk < 0:
            break
        start, stop = _part(model, chunk)
        store_i64(work.exact + 8 * chunk, _exact_part(model, start, stop, least, work.x, ids, values, logits))
        if finish(team, HEAD_CHUNKS):
            add_up(model, work)
            advance(team, phase)
    wait(team, phase)
