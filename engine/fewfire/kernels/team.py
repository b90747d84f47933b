"""Threads that walk through a sequence of phases together, without barriers.

A phase is a number of chunks. Each thread runs the same code; for every phase it takes chunks until none is left and
then waits until all are done. Whoever finishes a phase's last chunk runs the short serial step that follows it and
opens the next phase. So nobody waits for a thread that holds no chunk: one that the system has put aside finds the
phases closed when it comes back, and skips them until it has caught up. This is what keeps decoding alive on a busy
machine, and why results do not depend on the number of threads.

A phase's chunks are shared out into one region per thread. A thread goes through its own region from the beginning,
where one chunk's memory follows that of the one before, and then helps out in the regions of others.

The shared state is one int64 array. `PHASE` is the number of the open phase, `DONE` counts its finished chunks, and a
word for each region, from `TICKETS` on, holds `phase << 20 | chunks taken`. Phases only ever grow, so a late thread's
compare-and-swap cannot take a chunk of another phase.
"""

import platform
import sys

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from fewfire.kernels.compile import inline, step
from fewfire.kernels.simd import instruction

# In int64: each word has cache lines of its own.
REGIONS, PHASE, DONE, TICKETS, _STEP = 0, 16, 32, 48, 16
_SHIFT = 20
_MASK = (1 << _SHIFT) - 1
_NOTHING = ir.FunctionType(ir.VoidType(), [])
_SPINS = 1000  # some 20 us of polling before the core is offered to others


def new_team(threads: int) -> np.ndarray:
    """The shared state of one team, before its first phase (phase 0)."""
    team = np.zeros(TICKETS + threads * _STEP, np.int64)
    team[REGIONS] = threads
    return team


def next_phase(team: np.ndarray) -> int:
    """The number of the phase that is open now. Call it while no thread is at work."""
    return int(team[PHASE])


def _word(builder, address):
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@instruction(types.int64, types.intp)
def _load(builder, address):
    return builder.load_atomic(_word(builder, address), "acquire", 8)


@instruction(types.void, types.intp, types.int64)
def _store(builder, address, value):
    builder.store_atomic(value, _word(builder, address), "release", 8)


@instruction(types.int64, types.intp)
def _increment(builder, address):
    return builder.atomic_rmw("add", _word(builder, address), ir.Constant(ir.IntType(64), 1), "acq_rel")


@instruction(types.boolean, types.intp, types.int64, types.int64)
def _swap_if_equal(builder, address, expected, value):
    pair = builder.cmpxchg(_word(builder, address), expected, value, "acq_rel", "acquire")
    return builder.extract_value(pair, 1)


@instruction(types.void)
def _yield_core(builder):
    """Offers the core to another thread of the system."""
    name, result = ("SwitchToThread", ir.IntType(32)) if sys.platform == "win32" else ("sched_yield", ir.IntType(32))
    builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, []), name), [])


@instruction(types.void)
def _pause(builder):
    """Lets the other thread of an SMT core run while this one polls."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        builder.call(cgutils.get_or_insert_function(builder.module, _NOTHING, "llvm.x86.sse2.pause"), [])
    elif machine in ("arm64", "aarch64"):
        hint = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
        yield_hint = ir.Constant(ir.IntType(32), 1)
        builder.call(cgutils.get_or_insert_function(builder.module, hint, "llvm.aarch64.hint"), [yield_hint])


@inline
def region_of(team, chunk, chunks):
    """The first chunk of the region that a chunk belongs to, and the first that does not belong to it any more."""
    regions = team[REGIONS]
    region = (regions * (chunk + 1) - 1) // chunks
    return chunks * region // regions, chunks * (region + 1) // regions


@step
def take(team, phase, thread, chunks):
    """The number of a chunk of this phase that is now the caller's, or -1 if none is left."""
    regions = team[REGIONS]
    for i in range(regions):
        region = (thread + i) % regions
        start, stop = chunks * region // regions, chunks * (region + 1) // regions
        address = team.ctypes.data + 8 * (TICKETS + region * _STEP)
        ticket = _load(address)
        while ticket >> _SHIFT == phase and start + (ticket & _MASK) < stop:
            if _swap_if_equal(address, ticket, ticket + 1):
                return start + (ticket & _MASK)
            ticket = _load(address)
    return -1


@inline
def finish(team, chunks):
    """Marks a taken chunk as done. True for the last one: the caller then runs the serial step and calls `advance`."""
    return _increment(team.ctypes.data + 8 * DONE) + 1 == chunks


@step
def advance(team, phase):
    """Closes a phase whose chunks are all done, and opens the next."""
    _store(team.ctypes.data + 8 * DONE, 0)
    for region in range(team[REGIONS]):
        _store(team.ctypes.data + 8 * (TICKETS + region * _STEP), (phase + 1) << _SHIFT)
    _store(team.ctypes.data + 8 * PHASE, phase + 1)


@step
def wait(team, phase):
    """Returns the next phase's number once this one is closed."""
    address = team.ctypes.data + 8 * PHASE
    spins = 0
    while _load(address) == phase:
        spins += 1
        _pause()
        if spins > _SPINS:
            _yield_core()
    return phase + 1
