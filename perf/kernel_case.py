"""One call of a kernel, what it must have written, and memory that shows where it should not have read or written.

Outputs begin as NaN between zones that nobody may write to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Random = np.random.Generator
GUARD = 64  # bytes
ROUNDING = 2e-6  # of the sum of the terms' sizes: float32 additions in an order that the twin does not know


class Output:
    """Memory that a kernel writes to: NaN at first, between guard zones, with `spare` bytes that it may overwrite."""

    def __init__(self, shape: tuple[int, ...], dtype: type = np.float32, spare: int = 0) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._raw = np.full(2 * GUARD + size + spare, 0xFF, np.uint8)
        self._zones = self._raw[:GUARD], self._raw[GUARD + size + spare :]
        for zone in self._zones:
            zone[:] = 0xA5
        self.array: np.ndarray = self._raw[GUARD : GUARD + size].view(dtype).reshape(shape)

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    def intact(self) -> bool:
        """Whether the guard zones are as they were."""
        return all((zone == 0xA5).all() for zone in self._zones)


@dataclass(frozen=True)
class Expectation:
    """What an output must hold after a call; NaN where it must not have been written. Some of it may be undefined."""

    output: Output
    values: np.ndarray
    tolerance: np.ndarray | float = 0.0
    undefined: np.ndarray | bool = False

    def check(self) -> None:
        found = self.output.array
        assert self.output.intact(), "wrote outside its output"
        untouched = np.isnan(self.values) & ~np.asarray(self.undefined)
        assert np.isnan(found[untouched]).all(), "wrote where it should not"
        over = np.abs(found.astype(np.float64) - self.values) - self.tolerance
        wrong = ~untouched & ~(over <= 0) & ~np.asarray(self.undefined)
        if wrong.any():
            at = tuple(int(i[0]) for i in np.nonzero(wrong))
            raise AssertionError(
                f"{wrong.sum()} of {wrong.size} wrong, first at {at}: {found[at]}, not {self.values[at]}"
            )


@dataclass(frozen=True)
class Case:
    """One call of a primitive. `bytes` is what it has to read of a matrix or a cache.

    `verify` is for what no list of expected values can say.
    """

    run: Callable[[], None]
    expectations: tuple[Expectation, ...]
    bytes: int = 0
    scratch: tuple[Output, ...] = ()
    verify: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Calls the primitive and compares. Raises `AssertionError`."""
        self.run()
        for expectation in self.expectations:
            expectation.check()
        assert all(scratch.intact() for scratch in self.scratch), "wrote outside its scratch"
        self.verify()

    def results(self) -> list[np.ndarray]:
        """What the outputs hold."""
        return [expectation.output.array for expectation in self.expectations]
