"""Every primitive of the engine's kernels beside the few lines of NumPy that say what it computes.

`TABLE["gather_dot_q4"](random, rows=64, columns=576, chosen=rows)` draws fresh inputs and returns a `Case`: `run()` is
the call alone, for benchmarks, and `check()` runs it once and compares with the twin, for tests. Outputs begin as NaN
between zones that nobody may write to; NaN also lies between and behind the rows of every input, so that a kernel which
uses what it merely may read shows it. Twins compute in float64 and know nothing of lanes and registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fewfire import quantize
from fewfire.buffers import Activation, axpy_scratch
from fewfire.kernels import axpy, dense, gather, pointwise
from fewfire.kernels import rows as single
from fewfire.kernels.codes import dot_codes as dot_codes_kernel
from fewfire.quantize import FORMATS, GROUP, Layout, dot_order, padded
from fewfire.selectors import codes
from perf.kernel_case import GUARD, ROUNDING, Case, Expectation, Output, Random
from perf.kernel_steps import (
    CELLS,
    activate,
    attend,
    fit_q4,
    layer_norm,
    merge,
    remember,
    rms_norm,
    rotate,
    settle,
)


@dataclass(frozen=True)
class Matrix:
    """Packed rows with NaN between and behind them, and what they stand for."""

    raw: np.ndarray
    stride: int
    row_bytes: int
    values: np.ndarray  # (rows, padded columns), float64
    sizes: np.ndarray  # of the terms that a kernel adds up for each value
    scales: np.ndarray  # (rows, groups) float32; none for f32 and bf16
    minima: np.ndarray  # (rows, groups) float64

    @property
    def address(self) -> int:
        return self.raw.ctypes.data


def matrix(random: Random, rows: int, columns: int, weights: str, layout: Layout) -> Matrix:
    """A random matrix with rows of different sizes, some groups of zeros and one row of zeros."""
    values = random.standard_normal((rows, columns), np.float32) * np.exp(random.uniform(-3, 1, (rows, 1)))
    for group in range(0, columns, GROUP):
        values[random.random(rows) < 0.05, group : group + GROUP] = 0
    values[random.integers(rows)] = 0
    stored = quantize.encode(values.astype(np.float32), weights, layout)
    row_bytes = stored.nbytes // rows
    stride = row_bytes + 4 * int(random.integers(4))
    raw = np.full(rows * stride + GUARD, 0xFF, np.uint8)
    raw[: rows * stride].reshape(rows, stride)[:, :row_bytes] = stored.view(np.uint8)
    # With its padding, which q4 may store as something that is not quite zero.
    seen = quantize.decode(stored, weights, layout, padded(columns)).astype(np.float64)
    sizes = np.abs(seen)
    if weights == "q4":  # scale * integer and a minimum of the other sign
        sizes += 2 * np.repeat(sizes.reshape(rows, -1, GROUP).max(axis=2), GROUP, axis=1)
    groups, quants = (
        padded(columns) // GROUP,
        {"q8": padded(columns), "q4": padded(columns) // 2}.get(weights, row_bytes),
    )
    parameters = np.ascontiguousarray(stored.view(np.uint8)[:, quants:]).view(np.float16)
    scales, minima = parameters[:, :groups].astype(np.float32), np.zeros((rows, groups))
    if weights == "q4":
        minima += parameters[:, groups:]
    return Matrix(raw, stride, row_bytes, seen, sizes, scales, minima)


def quantized(values: np.ndarray, weights: str) -> tuple[np.ndarray, np.ndarray]:
    """The twin of activations as integers: `(tokens, columns)` int8 or int16, `(tokens, groups)` float32 scales."""
    kind, top = (np.int16, np.float32(32767)) if weights == "q8" else (np.int8, np.float32(127))
    groups = values.reshape(len(values), -1, GROUP)
    largest = np.abs(groups).max(axis=2)
    inverse = np.divide(top, largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(groups * inverse[:, :, None]).astype(kind).reshape(values.shape), largest / top


def per_lane(integers: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers in the order of dot rows, and each 32-bit lane's scale, alone and times its sum of integers."""
    tokens, columns = integers.shape
    quants = integers[:, dot_order(columns)]
    lane_scales, lane_sums, start, groups = [], [], 0, columns // GROUP
    while start < groups:
        block = next(size for size in (8, 4, 2) if size <= groups - start)
        lane_scales.append(np.repeat(scales[:, start : start + block], 8 // block, axis=1))
        inside = quants[:, GROUP * start : GROUP * (start + block)].reshape(tokens, block, 8, 4)
        lane_sums.append(lane_scales[-1] * inside.sum(axis=(1, 3), dtype=np.float32))
        start += block
    return quants, np.concatenate(lane_scales, axis=1), np.concatenate(lane_sums, axis=1)


def activation(random: Random, tokens: int, columns: int, weights: str) -> tuple[Activation, np.ndarray]:
    """Random vectors, and the float64 values that a kernel of this format sees of them (padded)."""
    vectors = Activation(columns, tokens)
    vectors.values[:, :columns] = random.standard_normal((tokens, columns), np.float32)
    vectors.values[:, :columns] *= np.exp(random.uniform(-2, 2, (tokens, columns))).astype(np.float32)
    vectors.values[random.random(tokens) < 0.1, : min(columns, GROUP)] = 0
    integers, scales = quantized(vectors.values, weights)
    vectors.quants(weights)[:], vectors.scales[:], vectors.sums[:] = per_lane(integers, scales)
    if weights in ("f32", "bf16"):
        return vectors, vectors.values.astype(np.float64)
    return vectors, integers * np.repeat(scales.astype(np.float64), GROUP, axis=1)


def _dots(x: np.ndarray, rows: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x . rows for every pair, `(vectors, rows)`, and how far float32 may be off."""
    return x @ rows.T, ROUNDING * (np.abs(x) @ sizes.T)


def gather_dot(weights: str, random: Random, *, rows: int, columns: int, chosen: Sequence[int] | np.ndarray) -> Case:
    """Dot products of the chosen rows with one vector: those in a piece of each quarter of the list."""
    m, listed = matrix(random, rows, columns, weights, "dot"), np.array(chosen, np.int32)
    x, seen = activation(random, 1, columns, weights)
    out = Output((listed.size,))
    values, tolerance = _dots(seen, m.values[listed], m.sizes[listed])
    soon, quarter = random.permutation(listed), -(-listed.size // 4)
    begin, end = np.sort(random.integers(0, quarter + 1, 2)) if random.random() < 0.5 else (0, quarter)
    places = np.minimum((quarter * np.arange(4)[:, None] + np.arange(begin, end)).reshape(-1), listed.size - 1)
    values[0, np.setdiff1d(np.arange(listed.size), places)] = np.nan
    lists = (listed.ctypes.data, soon.ctypes.data, m.row_bytes, listed.size, int(begin), int(end))
    arguments = (m.address, m.stride, *lists, x.descriptor.ctypes.data, out.address)

    def run(_keep: object = (m, x, listed, soon)) -> None:
        getattr(gather, f"gather_dot_{weights}")(*arguments)

    return Case(run, (Expectation(out, values[0], tolerance[0]),), listed.size * m.row_bytes)


def coefficients(m: Matrix, listed: np.ndarray, factors: np.ndarray, weights: str) -> np.ndarray:
    """What `gather_axpy` multiplies the integers of each listed row's groups with, `(rows, groups)` float64.

    Factor times scale, rounded to integers with a scale for each group of columns of eight rows of the list.
    """
    exact = factors[:, None] * m.scales[listed]  # float32
    out = np.zeros(exact.shape)
    top = np.float32(127 if weights == "q4" else 32767)
    for start in range(0, listed.size, axpy.BLOCK):
        block = exact[start : start + axpy.BLOCK]
        largest = np.maximum(np.abs(block).max(axis=0), np.float32(1e-30))
        out[start : start + axpy.BLOCK] = np.rint(block * (top / largest)) * (largest / top).astype(np.float64)
    return out


def scaled_sum(m: Matrix, listed: np.ndarray, factors: np.ndarray, weights: str) -> np.ndarray:
    """The sum of the listed rows, each times its factor, `(columns,)` float64."""
    if weights in ("f32", "bf16"):
        return factors @ m.values[listed]
    scales, minima = (np.repeat(p[listed].astype(np.float64), GROUP, axis=1) for p in (m.scales, m.minima))
    integers = np.divide(m.values[listed] - minima, scales, out=np.zeros_like(scales), where=scales != 0)
    rounded = np.repeat(coefficients(m, listed, factors, weights), GROUP, axis=1)
    total = (rounded * np.rint(integers)).sum(axis=0) + factors @ minima
    if weights == "q4":  # a rounding error counts for how far an integer is from the middle
        total += 7.5 * (factors[:, None].astype(np.float64) * scales - rounded).sum(axis=0)
    return total


def dot_codes(random: Random, *, rows: int, columns: int) -> Case:
    """Sums of the integers of all rows of a coded matrix times those of a vector, the largest there are among them."""
    matrix = random.integers(0, 256, (rows, codes.row_bytes(columns)), np.uint8)
    matrix[random.integers(rows)] = 0xFF
    raw = np.full(matrix.nbytes + GUARD, 0xFF, np.uint8)
    raw[: matrix.nbytes] = matrix.reshape(-1)
    x, out = random.integers(-127, 128, columns).astype(np.int8), Output((rows,))
    x[: columns // 2] = 127 * random.choice([-1, 1])
    values = codes.integers(matrix).astype(np.float64) @ x
    arguments = (raw.ctypes.data, matrix.shape[1], rows, x.ctypes.data, out.address)

    def run(_keep: object = (raw, x)) -> None:
        dot_codes_kernel(*arguments)

    return Case(run, (Expectation(out, values),), matrix.nbytes)


def gather_axpy(
    weights: str,
    random: Random,
    *,
    rows: int,
    columns: int,
    chosen: Sequence[int] | np.ndarray,
    bad: tuple[int, float] | None = None,
) -> Case:
    """y += the chosen rows, each times its factor; `bad`: a factor that is not finite, and its place."""
    m, listed = matrix(random, rows, columns, weights, "axpy"), np.array(chosen, np.int32)
    factors = random.standard_normal(listed.size, np.float32) * (random.random(listed.size) < 0.9)
    y, scratch = Output((padded(columns),)), Output((axpy_scratch(columns),))
    y.array[:] = random.standard_normal(y.array.size, np.float32)
    before = y.array.astype(np.float64)
    tolerance = ROUNDING * (np.abs(before) + np.abs(factors) @ m.sizes[listed])
    expected = Expectation(y, before + scaled_sum(m, listed, factors, weights), tolerance)
    if bad:
        factors[bad[0]] = bad[1]
    soon = random.permutation(listed)
    arguments = (
        m.address, m.stride, listed.ctypes.data, soon.ctypes.data, listed.size, factors.ctypes.data, y.address,
        padded(columns), scratch.address,
    )  # fmt: skip

    def run(_keep: object = (m, listed, soon, factors)) -> None:
        getattr(axpy, f"gather_axpy_{weights}")(*arguments)

    return Case(run, (expected,), listed.size * m.row_bytes, (scratch,))


def read_row(weights: str, random: Random, *, rows: int, columns: int, row: int) -> Case:
    """One dot row as float32."""
    m, out = matrix(random, rows, columns, weights, "dot"), Output((padded(columns),))
    address = m.address + row * m.stride

    def run(_keep: object = m) -> None:
        getattr(single, f"read_row_{weights}")(address, padded(columns), out.address)

    return Case(run, (Expectation(out, m.values[row]),), m.row_bytes)


def dot_tokens(weights: str, random: Random, *, rows: int, columns: int, tokens: int) -> Case:
    """Dot products of neighbouring rows with several vectors."""
    m = matrix(random, rows, columns, weights, "dot")
    x, seen = activation(random, tokens, columns, weights)
    out = Output((tokens, rows + int(random.integers(5))))
    values, tolerance = np.full(out.array.shape, np.nan), np.zeros(out.array.shape)
    values[:, :rows], tolerance[:, :rows] = _dots(seen, m.values, m.sizes)
    arguments = (m.address, m.stride, rows, x.descriptor.ctypes.data, tokens, out.address, out.array.strides[0])

    def run(_keep: object = (m, x)) -> None:
        getattr(dense, f"dot_tokens_{weights}")(*arguments)

    return Case(run, (Expectation(out, values, tolerance),), rows * m.row_bytes)


def down_strip(weights: str, random: Random, *, neurons: int, columns: int, strip: int, tokens: int) -> Case:
    """64 columns of the sum of all down rows, each times its neuron's activation, for several tokens."""
    m, width = matrix(random, neurons, columns, weights, "axpy"), padded(columns)
    h = np.full((tokens, neurons + int(random.integers(5))), np.nan, np.float32)
    h[:, :neurons] = random.standard_normal((tokens, neurons), np.float32)
    h[:, :neurons] *= random.random((tokens, neurons)) < 0.5
    y, panel = Output((tokens, width)), Output((64, 64))
    values, tolerance = np.full((tokens, width), np.nan), np.zeros((tokens, width))
    part = slice(dense.STRIP * strip, dense.STRIP * (strip + 1))
    fired = h[:, :neurons].astype(np.float64)
    values[:, part], tolerance[:, part] = _dots(fired, m.values[:, part].T, m.sizes[:, part].T)
    arguments = (
        m.address, m.stride, neurons, width, strip, tokens, h.ctypes.data, h.strides[0], panel.address, y.address,
        y.array.strides[0],
    )  # fmt: skip

    def run(_keep: object = (m, h)) -> None:
        getattr(dense, f"down_strip_{weights}")(*arguments)

    return Case(run, (Expectation(y, values, tolerance),), neurons * m.row_bytes * dense.STRIP // width, (panel,))


def quantize_vector(weights: str, random: Random, *, columns: int, tokens: int = 1, vector: int = 0) -> Case:
    """The integer side of one of several vectors, integer for integer; q8 rows have no use for sums."""
    x, _ = activation(random, tokens, columns, "f32")
    integers, scales = quantized(x.values[vector : vector + 1], weights)
    expected = per_lane(integers, scales)[: 3 if weights == "q4" else 2]
    outputs = [Output((tokens, e.shape[1]), e.dtype.type) for e in expected]
    scratch = Output((512 * tokens,), np.int8)
    descriptor = x.descriptor.copy()
    descriptor[1 : 1 + len(outputs)] = [o.address for o in outputs]
    descriptor[6] = scratch.address

    def run(_keep: object = x) -> None:
        getattr(pointwise, f"quantize_{weights}")(descriptor.ctypes.data, vector)

    def rows(output: Output, values: np.ndarray) -> Expectation:
        whole = output.array.astype(np.float64)
        whole[vector] = values[0]
        return Expectation(output, whole)

    return Case(run, tuple(rows(o, e) for o, e in zip(outputs, expected, strict=True)), scratch=(scratch,))


TABLE: dict[str, Callable[..., Case]] = {
    **{f"{f.__name__}_{w}": partial(f, w) for f in (gather_dot, gather_axpy, read_row) for w in FORMATS},
    **{f"{f.__name__}_{w}": partial(f, w) for f in (dot_tokens, down_strip) for w in FORMATS},
    **{f"attend_{c}_{queries}": partial(attend, c, queries) for c in CELLS for queries in (1, 2, 3, 4)},
    **{f"remember_{c}": partial(remember, c) for c in CELLS},
    "dot_codes": dot_codes,
    "merge": merge,
    "settle": settle,
    "fit_q4": fit_q4,
    **{f"quantize_{w}": partial(quantize_vector, w) for w in ("q8", "q4")},
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "activate": activate,
    "rotate": rotate,
}
