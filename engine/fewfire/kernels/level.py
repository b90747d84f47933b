"""Which vector instructions the integer dot products use, chosen once at import.

`FEWFIRE_SIMD` forces a level (for tests and for hunting bugs); one that the CPU lacks is an error, not a crash later.
"""

import os

import llvmlite.binding as llvm

LEVELS = ("vnni", "avx2", "neon", "plain")


def available() -> tuple[str, ...]:
    """The levels that this CPU can run, best first; "plain" is always among them."""
    features = llvm.get_host_cpu_features()
    levels = []
    if features.get("avxvnni") or (features.get("avx512vnni") and features.get("avx512vl")):
        levels.append("vnni")
    if features.get("avx2") and features.get("fma"):
        levels.append("avx2")
    if features.get("dotprod") and "aarch64" in llvm.get_process_triple():
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
