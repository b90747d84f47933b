"""Probes in a model's decode loop: primitives that pass a call on and count the time it takes.

The loop calls primitives by the addresses in the model's record, so that others can stand in for them without the loop
being any different: the same code decodes the same weights in the same order. For one thread: counters are not shared.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

import fewfire
from fewfire.kernels.codes import dot_codes
from fewfire.kernels.compile import Primitive
from fewfire.kernels.simd import call, instruction, load_i64, store_i64

# By where a call's matrix lies; the last two are of a selection.
MATRICES = ("qkv", "o", "gate", "up", "bypass", "predictor", "screen")
PARTS = (*MATRICES, "down", "attention", "head", "small steps")
_PART_OF = {"gather_axpy": "down", "table_dot": "head", "dot_codes": "screen"}  # all else is small
_PART_OF |= dict.fromkeys(("attend", "attend_rest", "merge", "settle"), "attention")
_OF_PREFILL = ("dot_tokens", "down_strip", "table_tokens")
_OPTIONS = {"error_model": "numpy", "boundscheck": False}
# The time stamp counter of x86; elsewhere a timer that programs may read.
_CLOCK = "readcyclecounter" if platform.machine().lower() in ("x86_64", "amd64") else "readsteadycounter"


@instruction(types.int64)
def ticks(builder):
    """Time, in a unit of the machine's own."""
    function = ir.FunctionType(ir.IntType(64), [])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.{_CLOCK}"), [])


@numba.njit(**_OPTIONS)
def now() -> int:
    """The same for Python."""
    return ticks()


def _form(forward: Callable[[tuple[Any, ...]], None], count: int) -> Callable[..., None]:
    """`forward` as a function of so many arguments: compiled functions cannot take any number of them."""
    names = ", ".join(f"a{i}" for i in range(count))
    return eval(f"lambda {names}: forward(({names},))", {"forward": forward})


def matrices(model: fewfire.Model) -> list[tuple[str, np.ndarray]]:
    """The matrices of `MATRICES` that a model and its selection have; a part may have several."""
    arrays, selection = model.packed.arrays, model.engine._selection
    found = [(name, arrays.get("updown" if name == "up" else name)) for name in MATRICES]
    if selection and selection.predictor:
        found += [("predictor", selection.predictor.rows), ("predictor", selection.predictor.basis)]
    if selection and selection.screen:
        screen = selection.screen
        found += [("screen", array) for array in vars(screen).values() if isinstance(array, np.ndarray)]
    return [(name, array) for name, array in found if array is not None]


def _probe(primitive: Primitive, counters: np.ndarray, met: list[tuple[str, np.ndarray]], part: int) -> Any:
    """Stands in for a primitive; a call counts for the part whose matrix its first argument lies in, or for `part`."""
    address, at = primitive.address, counters.ctypes.data
    nowhere = 0, 0, part  # so that there is a range for Numba to loop over
    first, last, parts = zip(nowhere, *(_range(*each) for each in met), strict=True)
    count = len(parts)

    @numba.njit(**_OPTIONS)
    def forward(arguments):
        begin = ticks()
        call(address, arguments)
        spent = ticks() - begin
        chosen = part
        for i in range(count):
            if first[i] <= arguments[0] < last[i]:
                chosen = parts[i]
        store_i64(at + 8 * chosen, load_i64(at + 8 * chosen) + spent)

    form = _form(forward, len(primitive._signature.args))
    return numba.cfunc(primitive._signature, **_OPTIONS)(form)


def _range(name: str, array: np.ndarray) -> tuple[int, int, int]:
    """Where a matrix begins and ends, and the number of its part."""
    return array.ctypes.data, array.ctypes.data + array.nbytes, PARTS.index(name)


class Probes:
    """Within `with`, the model's calls are counted in `ticks`, one number for each of `PARTS`."""

    def __init__(self, model: fewfire.Model) -> None:
        self._record = model.engine._model.record
        self.ticks = np.zeros(len(PARTS), np.int64)
        met = matrices(model)
        self._probes: dict[str, Any] = {}
        primitives = {name: p for name, p in model.engine._primitives.items() if name not in _OF_PREFILL}
        if self._record["screen"][0]:
            primitives["dot_codes"] = dot_codes
        for name, primitive in primitives.items():
            part = PARTS.index(_PART_OF.get(name, "small steps"))
            self._probes[name] = _probe(primitive, self.ticks, met if name in ("gather_dot", "table_dot") else [], part)
        self._own = {name: int(self._record[name][0]) for name in self._probes}

    def __enter__(self) -> Probes:
        self.ticks[:] = 0
        for name, probe in self._probes.items():
            self._record[name] = probe.address
        return self

    def __exit__(self, *_: object) -> None:
        for name, address in self._own.items():
            self._record[name] = address
