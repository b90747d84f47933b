"""What a token has read, in bytes: chunks count their rows and columns, and whoever ends the last phase adds them up.

In the kernel, because Python's own code is out of the caches after a token (perf/LOG.md, "what Python takes of a
token").
"""

from fewfire.kernels.columns import COLUMN_CHUNKS
from fewfire.kernels.compile import step
from fewfire.kernels.select import NEURON_CHUNKS
from fewfire.kernels.simd import load_i64, store_i64
from fewfire.kernels.work import HEAD_CHUNKS


@step
def add_up(model, work):
    """`work.bytes`: of all rows and columns that the token has read, as they were counted."""
    gate, up, down = model.gate_stride, model.down, model.updown_stride - model.down
    total = 0
    for at in range(work.read, work.read + 24 * model.layers * NEURON_CHUNKS, 24):
        total += gate * load_i64(at) + up * load_i64(at + 8) + down * load_i64(at + 16)
    for at in range(work.projected, work.projected + 24 * model.layers * COLUMN_CHUNKS, 8):
        total += load_i64(at)
    for at in range(work.exact, work.exact + 8 * HEAD_CHUNKS, 8):
        total += model.table_stride * load_i64(at)
    store_i64(work.bytes, total)
