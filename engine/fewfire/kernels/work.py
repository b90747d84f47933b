"""The buffers of one token as the kernels see them, and the types of what the steps of `decode` are given."""

from numba import types

from fewfire.kernels.compile import one
from fewfire.kernels.layer import LAYER, MODEL, record

HEAD_CHUNKS = 32  # that the screened vocabulary is shared out in: a fixed number, which decides the order of additions

# Float32 unless said: descriptors of `x` (hidden,), of `wide`, the same for rows in the tables' format, and `attended`,
# whose values are `joined` (heads * head_dim,); the residual stream `hidden` and what a block adds to it, `delta`;
# `query` (heads, head_width), `key` (head_width,); `parts` of the heads' attention, the ranges of one head so many
# bytes after those of the one before; `partial` sums of chunks, (NEURON_CHUNKS, width) or (COLUMN_CHUNKS, outputs
# padded); `cos` and `sin` (2, rope_half) of the RoPE angles. Each thread has `scores` (scratch of attention), `ids`
# int32, `gate` and `up` (longest,) of a chunk of neurons, `block` (4, BLOCK) of those that are scattered together,
# `factors` (scratch of gather_axpy). For selectors: the descriptor of `hint`, whose values are `hint_values` (rank,),
# of a predictor; `gates` and `ups` (neurons,) where they are there before the neurons' phase (`gates` has room for the
# columns' sums, all gate rows and then all up rows), and `least`, which the largest gates are over, and at last the
# logits of candidates. For a screened head (see `head.py`) `inner` (screen_rank,), what its basis makes of x, and
# `reduced`, the same as int8; `affine` (3,), which makes logits of integers; of each of its HEAD_CHUNKS the `largest`
# logit and the `totals` of exp(logit - largest); of each thread `candidates` int32 (LIST,) and their `values`. What was
# read is counted, int64: gate, up and down rows in `read` (layers, NEURON_CHUNKS, 3); bytes of the columns of qkv, of
# o, and of gate with up in `projected` (layers, 3, COLUMN_CHUNKS); rows of the head in `exact` (HEAD_CHUNKS,), 0 where
# all are read; the bytes of all these in `bytes` (1,).
WORK = record("""
    x wide attended joined hidden delta qkv query key parts parts_stride scores scores_stride partial cos sin
    ids gate up longest block factors factors_stride read
    hint hint_values gates ups least projected
    reduced inner affine largest totals exact candidates values bytes
""")

# Arguments of the steps that are primitives, because only selections need them.
THE_MODEL, A_LAYER, THE_WORK = one(MODEL), one(LAYER), one(WORK)
A_PHASE = types.int64[::1], types.int64, types.int64  # the team, the phase's number, the thread's
