"""What the kernels that know of levels compute from fixed inputs: `FEWFIRE_SIMD=plain python levels.py OUT.npz`."""

from __future__ import annotations

import sys

import numpy as np

from perf.kernel_table import TABLE

# The others are the same code at every level.
SHAPES: dict[str, dict[str, object]] = {
    **{f"gather_dot_{w}": {"rows": 21, "columns": 448, "chosen": [3, 20, 7, 7, 0]} for w in ("q8", "q4")},
    **{f"gather_axpy_{w}": {"rows": 21, "columns": 448, "chosen": [3, 20, 7, 7, 0]} for w in ("q8", "q4")},
    "dot_codes": {"rows": 21, "columns": 448},
    **{f"dot_tokens_{w}": {"rows": 21, "columns": 448, "tokens": 8} for w in ("q8", "q4")},
    "down_strip_q4": {"neurons": 100, "columns": 192, "strip": 1, "tokens": 8},
    **{f"attend_f16_{queries}": {"start": 3, "stop": 50, "head_dim": 20} for queries in (1, 2, 3, 4)},
    **{f"quantize_{w}": {"columns": 448, "tokens": 3, "vector": 1} for w in ("q8", "q4")},
}


def results() -> dict[str, np.ndarray]:
    """Every output, under the kernel's name and a number."""
    found = {}
    for name, shape in SHAPES.items():
        case = TABLE[name](np.random.default_rng(1), **shape)
        case.check()
        found |= {f"{name} {i}": array for i, array in enumerate(case.results())}
    return found


if __name__ == "__main__":
    np.savez(sys.argv[1], **results())
