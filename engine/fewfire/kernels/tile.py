"""Register tiles of attention: a few queries meet several cached keys, or several pieces of cached values, at once.

What comes from the cache is widened to float32 once for all queries. The loops are spelled out as LLVM IR, so that one
definition serves any number of queries. Up to 12 accumulators, the fewer of the queries and the pieces, and one of the
others fill the 16 registers of AVX2.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fewfire.kernels.simd import (
    add_halves,
    add_neighbours,
    add_pairs,
    f32x8,
    fma,
    load_f16x8,
    load_f32x8,
    mul,
    splat_f32,
    splat_f32_at,
    store_f32x8,
)

QUERIES = 4  # of a full tile; the scores of one position are these many floats
_I64 = ir.IntType(64)
_LOADS = {2: load_f16x8, 4: load_f32x8}  # by the bytes of an element


def beside(queries: int) -> int:
    """Keys, or pieces of eight values, that a tile of so many queries takes at once."""
    return 3 if queries == QUERIES else 4


def _tile(emit: Callable[..., None]) -> Any:
    """Makes a Numba intrinsic, which takes a tuple of numbers, from `emit(builder, *numbers)`."""

    @intrinsic
    def tile(typing, numbers):
        def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> Any:
            emit(builder, *cgutils.unpack_tuple(builder, values[0]))
            return context.get_dummy_value()

        return types.void(numbers), codegen

    return tile


def _never_unrolled(module: ir.Module) -> ir.values.MDValue:
    """Metadata for a loop: its registers are full already (perf/LOG.md, "attention by ranges of positions")."""
    loop = module.add_metadata([module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])])
    loop.operands = (loop, *loop.operands[-1:])  # LLVM wants the first one to be the node itself
    return loop


def _loop(
    builder: ir.IRBuilder, stop: ir.Value, step: int, count: int, body: Callable[..., list[ir.Value]]
) -> list[ir.Value]:
    """`for i in range(0, stop, step): sums = body(i, sums)` on so many vectors, zero at first. At least one round."""
    before, inside, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(inside)
    builder.position_at_end(inside)
    i, sums = builder.phi(_I64), [builder.phi(f32x8.llvm) for _ in range(count)]
    results = body(i, sums)
    following = builder.add(i, ir.Constant(_I64, step))
    branch = builder.cbranch(builder.icmp_signed("<", following, stop), inside, after)
    branch.set_metadata("llvm.loop", _never_unrolled(builder.module))
    zero = ir.Constant(f32x8.llvm, [0.0] * 8)
    for phi, first, later in zip(
        [i, *sums], [ir.Constant(_I64, 0), *[zero] * count], [following, *results], strict=True
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(later, inside)
    builder.position_at_end(after)
    return results


def _at(builder: ir.IRBuilder, base: ir.Value, *terms: tuple[ir.Value, int]) -> ir.Value:
    """base + the sum of value * factor."""
    for value, factor in terms:
        base = builder.add(base, builder.mul(value, ir.Constant(_I64, factor)))
    return base


def _accumulate(
    builder: ir.IRBuilder,
    ours: Sequence[Callable[[], ir.Value]],
    cells: Sequence[Callable[[], ir.Value]],
    sums: Sequence[ir.Value],
) -> list[ir.Value]:
    """sums[q, c] + ours[q] * cells[c], row by row. The fewer stay in registers while the others are read one by one."""
    results, swap = list(sums), len(cells) <= len(ours)
    few, many = (cells, ours) if swap else (ours, cells)
    held = [read() for read in few]
    for m, read in enumerate(many):
        one = read()
        for f, other in enumerate(held):
            at = m * len(cells) + f if swap else f * len(cells) + m
            results[at] = fma.emit(builder, one, other, sums[at])
    return results


def _dots(queries: int, size: int) -> Any:
    load, keys = _LOADS[size], beside(queries)

    @_tile
    def dots(builder, query, stride, key, row, width, scale, scores):
        """scores[k, q] = scale * query_q . key_k for `beside` keys: queries and keys are `stride` and `row` apart."""

        def step(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            cells = [lambda k=k: load.emit(builder, _at(builder, key, (row, k), (i, size))) for k in range(keys)]
            ours = [
                lambda q=q: load_f32x8.emit(builder, _at(builder, query, (stride, q), (i, 4))) for q in range(queries)
            ]
            return _accumulate(builder, ours, cells, sums)

        sums = _loop(builder, width, 8, keys * queries, step)
        zero = ir.Constant(f32x8.llvm, [0.0] * 8)
        rows = [sums[k::keys] + [zero] * (QUERIES - queries) for k in range(keys)]
        rows += [[zero] * QUERIES] * (keys % 2)
        scales = splat_f32.emit(builder, builder.fptrunc(scale, ir.FloatType()))
        for k in range(0, keys, 2):
            a, b, c, d = (add_halves.emit(builder, *pair) for pair in zip(*rows[k : k + 2], strict=True))
            pairs = add_pairs.emit(builder, a, b), add_pairs.emit(builder, c, d)
            values = mul.emit(builder, add_neighbours.emit(builder, *pairs), scales)
            store_f32x8.emit(builder, _at(builder, scores, (ir.Constant(_I64, 16), k)), values)

    return dots


def _mix(queries: int, size: int) -> Any:
    load, pieces = _LOADS[size], beside(queries)

    @_tile
    def mix(builder, weights, values, row, count, pitch, out, stride):
        """out_q = the sum over `count` positions p of weights[p, q] * value_p, for `beside` pieces of eight elements.

        Positions are `row` bytes apart, pieces `pitch` bytes; the queries' results `stride` bytes.
        """

        def step(p: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            four = _at(builder, weights, (p, 4 * QUERIES))
            value = builder.add(values, builder.mul(p, row))
            cells = [lambda c=c: load.emit(builder, _at(builder, value, (pitch, c))) for c in range(pieces)]
            shares = [
                lambda q=q: splat_f32_at.emit(builder, _at(builder, four, (ir.Constant(_I64, q), 4)))
                for q in range(queries)
            ]
            return _accumulate(builder, shares, cells, sums)

        sums = _loop(builder, count, 1, pieces * queries, step)
        for c in range(pieces):
            for q in range(queries):
                cell = _at(builder, out, (pitch, c * 4 // size), (stride, q))
                store_f32x8.emit(builder, cell, sums[q * pieces + c])

    return mix


# By the format of the cache and the number of queries.
dots_f16_1, dots_f16_2, dots_f16_3, dots_f16_4 = (_dots(queries, 2) for queries in (1, 2, 3, 4))
dots_f32_1, dots_f32_2, dots_f32_3, dots_f32_4 = (_dots(queries, 4) for queries in (1, 2, 3, 4))
mix_f16_1, mix_f16_2, mix_f16_3, mix_f16_4 = (_mix(queries, 2) for queries in (1, 2, 3, 4))
mix_f32_1, mix_f32_2, mix_f32_3, mix_f32_4 = (_mix(queries, 4) for queries in (1, 2, 3, 4))
