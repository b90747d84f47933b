"""Which vector instructions the integer dot products use, chosen once at import.

`FEWFIRE_SIMD` forces a level (for tests and for hunting bugs); one that the CPU lacks is an error, not a crash later.
"""

import os

import llvmlite.binding as llvm
import numba

LEVELS = ("vnni", "avx2", "neon", "plain")


def _features() -> set[str]:
    """What Numba compiles for: the features of this CPU, unless its own settings say otherwise."""
    if numba.config.CPU_FEATURES is not None:
        return {name[1:] for name in numba.config.CPU_FEATURES.split(",") if name.startswith("+")}
    if numba.config.CPU_NAME == "generic":
        return set()
    return {name for name, present in llvm.get_host_cpu_features().items() if present}


def available() -> tuple[str, ...]:
    """The levels that this CPU can run, best first; "plain" is always among them."""
    features = _features()
    levels = []
    if {"avx2", "fma", "f16c"} <= features:
        if "avxvnni" in features or {"avx512vnni", "avx512vl"} <= features:
            levels.append("vnni")
        levels.append("avx2")
    if "dotprod" in features and "aarch64" in llvm.get_process_triple():
        levels.append("neon")
    return (*levels, "plain")


def _choose() -> str:
    forced = os.environ.get("FEWFIRE_SIMD", "auto")
    if forced == "auto":
        return available()[0]
    if forced not in available():
        raise ValueError(f"FEWFIRE_SIMD={forced}: this CPU runs {', '.join(available())} or auto")
    return forced


LEVEL = _choose()
