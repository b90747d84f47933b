"""The instructions that levels are about, compiled for CPUs that the test need not run on, and float16 conversion."""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba import types

from fewfire.kernels import products, simd
from fewfire.kernels.compile import primitive

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
AVX2 = "+avx2,+fma,+f16c"
TARGETS = {
    "avx512": ("vnni", X86, f"{AVX2},+avx512vnni,+avx512vl"),
    "avxvnni": ("vnni", X86, f"{AVX2},+avxvnni"),
    "avx2": ("avx2", X86, AVX2),
    "neon": ("neon", ARM, "+neon,+dotprod"),
    "plain x86": ("plain", X86, ""),
    "plain arm": ("plain", ARM, ""),
}
INTEGERS, BYTES, SHORTS = simd.i32x8.llvm, simd.i8x32.llvm, simd.i16x16.llvm
HALVES = ir.VectorType(ir.IntType(16), 8)
_I = types.int64


def assembly(target: str, emit: Callable[..., ir.Value], result: ir.Type, *arguments: ir.Type) -> str:
    """What becomes of a function that is made by `emit(builder, level, *arguments)` on some CPU."""
    level, triple, features = TARGETS[target]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    pointers = [t.as_pointer() for t in (*arguments, result)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), pointers), "probe")
    builder = ir.IRBuilder(function.append_basic_block())
    *sources, out = function.args
    builder.store(emit(builder, level, *(builder.load(a, align=1) for a in sources)), out, align=1)
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return llvm.Target.from_triple(triple).create_target_machine(features=features, opt=3).emit_assembly(parsed)


def dot_i16(target: str) -> str:
    return assembly(target, products.emit_dot_i16, INTEGERS, INTEGERS, SHORTS, SHORTS)


def dot_u4(target: str) -> str:
    return assembly(target, products.emit_dot_u4, INTEGERS, INTEGERS, BYTES, BYTES)


def add_pairs_u4(target: str) -> str:
    return assembly(target, products.emit_add_pairs_u4, SHORTS, SHORTS, BYTES, BYTES)


@pytest.mark.parametrize("target", ["avx512", "avxvnni", "avx2"])
def test_pairs_of_rows_take_one_multiplication(target: str) -> None:
    assert add_pairs_u4(target).count("vpmaddubsw") == 1


@pytest.mark.parametrize("target", ["avx512", "avxvnni"])
def test_vnni(target: str) -> None:
    assert dot_u4(target).count("vpdpbusd") == 1
    assert dot_i16(target).count("vpdpwssd") == 1


def test_avx2() -> None:
    assert dot_u4("avx2").count("vpmaddubsw") == dot_i16("avx2").count("vpmaddwd") == 1
    assert "vpmaddwd" not in dot_u4("avx2"), "widening is left to `settle`"
    assert "vpmaddwd" in assembly("avx2", products.emit_settle, INTEGERS, INTEGERS)


def test_neon() -> None:
    assert dot_u4("neon").count("sdot") == 2
    assert "smlal" in dot_i16("neon") or "smull" in dot_i16("neon")


@pytest.mark.parametrize("target", ["plain x86", "plain arm"])
def test_plain_needs_nothing_special(target: str) -> None:
    for code in (dot_i16(target), dot_u4(target), add_pairs_u4(target)):
        assert not any(name in code for name in ("ymm", "vpdpbusd", "sdot"))


@pytest.mark.parametrize("target", TARGETS)
def test_half_floats_compile_everywhere(target: str) -> None:
    code = assembly(target, simd.emit_half_to_float, simd.f32x8.llvm, HALVES)
    assert "extendhfsf2" not in code, "a library call that Numba's linker may not find"
    if target in ("avx512", "avxvnni", "avx2"):
        assert "vcvtph2ps" in code


@primitive(_I, _I)
def _to_float(source: int, target: int) -> None:
    simd.store_f32x8(target, simd.load_f16x8(source))


@primitive(_I, _I)
def _to_half(source: int, target: int) -> None:
    simd.store_f16x8(target, simd.load_f32x8(source))


def test_every_half_float_is_read_as_it_is_meant() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    out = np.empty(halves.size, np.float32)
    for at in range(0, halves.size, 8):
        _to_float(halves.ctypes.data + 2 * at, out.ctypes.data + 4 * at)
    np.testing.assert_array_equal(out.view(np.uint32), halves.view(np.float16).astype(np.float32).view(np.uint32))


def test_halves_are_rounded_to_nearest_even_and_clamped() -> None:
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (every[1:] + every[:-1]) / 2  # ties
    rng = np.random.default_rng()
    # Not among the subnormals, where one value in some 10,000 is rounded twice and so by the other half of a tie.
    anywhere = np.exp(rng.uniform(-9.6, 11, 4096)).astype(np.float32)
    values = np.concatenate([every, between, anywhere, np.float32([65504, 65519, 65520, 7e4, 3e38, 1e-45, 0])])
    values = np.concatenate([values, -values])
    values = np.concatenate([values, np.zeros(-values.size % 8, np.float32)])
    out = np.empty(values.size, np.float16)
    for at in range(0, values.size, 8):
        _to_half(values.ctypes.data + 4 * at, out.ctypes.data + 2 * at)
    expected = np.clip(values, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))
