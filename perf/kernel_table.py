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
from fewfire.kernels import attention, axpy, dense, encode, gather, pointwise
from fewfire.kernels import rows as single
from fewfire.quantize import FORMATS, GROUP, Layout, dot_order, padded

Random = np.random.Generator

_GUARD = 64  # bytes
_ROUNDING = 2e-6  # of the sum of the terms' sizes: float32 additions in an order that the twin does not know


class Output:
    """Memory that a kernel writes to: NaN at first, between guard zones, with `spare` bytes that it may overwrite."""

    def __init__(self, shape: tuple[int, ...], dtype: type = np.float32, spare: int = 0) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._raw = np.full(2 * _GUARD + size + spare, 0xFF, np.uint8)
        self._zones = self._raw[:_GUARD], self._raw[_GUARD + size + spare :]
        for zone in self._zones:
            zone[:] = 0xA5
        self.array: np.ndarray = self._raw[_GUARD : _GUARD + size].view(dtype).reshape(shape)

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
    raw = np.full(rows * stride + _GUARD, 0xFF, np.uint8)
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
    return x @ rows.T, _ROUNDING * (np.abs(x) @ sizes.T)


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
    tolerance = _ROUNDING * (np.abs(before) + np.abs(factors) @ m.sizes[listed])
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


def rms_norm(random: Random, *, columns: int, in_place: bool = False, eps: float = 1e-5) -> Case:
    """x / sqrt(mean(x^2) + eps) * weight."""
    x, weight, out = _vector(random, columns), _vector(random, columns), Output((columns,))
    if in_place:
        out.array[:] = x
    wide = x.astype(np.float64)
    values = wide / np.sqrt(np.mean(wide**2) + eps) * weight
    arguments = (out.address if in_place else x.ctypes.data, weight.ctypes.data, eps, columns, out.address)

    def run(_keep: object = (x, weight)) -> None:
        pointwise.rms_norm(*arguments)

    return Case(run, (Expectation(out, values, _ROUNDING * np.abs(values) + 1e-30),))


def layer_norm(random: Random, *, columns: int, eps: float = 1e-5) -> Case:
    """(x - mean) / sqrt(var + eps) * weight + bias."""
    x, weight, bias, out = *(_vector(random, columns) for _ in range(3)), Output((columns,))
    x += 3
    wide = x.astype(np.float64)
    scaled = (wide - wide.mean()) / np.sqrt(wide.var() + eps) * weight
    arguments = (x.ctypes.data, weight.ctypes.data, bias.ctypes.data, eps, columns, out.address)

    def run(_keep: object = (x, weight, bias)) -> None:
        pointwise.layer_norm(*arguments)

    return Case(run, (Expectation(out, scaled + bias, _ROUNDING * (np.abs(scaled) + np.abs(bias))),))


def activate(random: Random, *, kind: int, count: int, threshold: float = 0.0) -> Case:
    """The activation function, in place; it may overwrite the seven values that follow."""
    out = Output((count,), spare=28)
    out.array[:] = random.standard_normal(count, np.float32) * 5
    special = np.array([0, -0.0, 1e-30, -1e-30, 90, -90, 3e4, -3e4, 1e15, -1e15, threshold], np.float32)
    out.array[: min(count, special.size)] = special[:count]
    x = out.array.astype(np.float64)
    with np.errstate(over="ignore"):
        values = {
            pointwise.SILU: lambda: x / (1 + np.exp(-x)),
            pointwise.GELU_TANH: lambda: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
            pointwise.RELU: lambda: np.maximum(x, 0),
            pointwise.RELU2: lambda: np.maximum(x, 0) ** 2,
            pointwise.FATRELU: lambda: np.where(x > np.float32(threshold), x, 0),
        }[kind]()

    def run() -> None:
        pointwise.activate(kind, threshold, out.address, count)

    return Case(run, (Expectation(out, values, _ROUNDING * np.abs(values) + 1e-7),))


def rotate(random: Random, *, half: int) -> Case:
    """RoPE of one head: pairs (i, i + half) turned by random angles."""
    out, angles = Output((2 * half,)), random.uniform(-4, 4, half)
    out.array[:] = _vector(random, 2 * half)
    turned = (out.array[:half] + 1j * out.array[half:]) * np.exp(1j * angles)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    sizes = np.tile(np.abs(out.array[:half]) + np.abs(out.array[half:]), 2)
    arguments = (out.address, cos.ctypes.data, sin.ctypes.data, half)

    def run(_keep: object = (cos, sin)) -> None:
        pointwise.rotate(*arguments)

    return Case(run, (Expectation(out, np.concatenate([turned.real, turned.imag]), _ROUNDING * sizes),))


def fit_q4(random: Random, *, groups: int) -> Case:
    """Integers, scale and minimum of q4 groups: as good as the twin's, if not the same where two spans are equal."""
    values = (random.standard_normal((1, groups, GROUP)) * np.exp(random.uniform(-6, 4, (groups, 1)))).astype(
        np.float32
    )
    values[0, random.random(groups) < 0.1] = random.standard_normal()
    integers, scales, minima = Output((groups, GROUP), np.int8), Output((groups,)), Output((groups,))

    def run() -> None:
        spans = quantize.SPANS
        into = integers.address, scales.address, minima.address
        encode.fit_q4(values.ctypes.data, groups, spans.ctypes.data, spans.size, *into)

    def error(levels: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        found = scale.reshape(-1, 1).astype(np.float64) * levels.reshape(-1, GROUP) + minimum.reshape(-1, 1)
        return ((values[0] - found) ** 2).sum(axis=1)

    def verify() -> None:
        ours = error(integers.array, scales.array, minima.array)
        theirs = error(*quantize.fit_q4(values))
        assert (ours <= theirs * 1.001 + 1e-6 * (values[0] ** 2).sum(axis=1)).all(), "a worse fit than the twin's"
        assert 0 <= integers.array.min() <= integers.array.max() <= 15
        for parameter in (scales.array, minima.array):
            np.testing.assert_array_equal(parameter, parameter.astype(np.float16))

    return Case(run, (), scratch=(integers, scales, minima), verify=verify)


_CELLS: dict[str, type[np.floating]] = {"f32": np.float32, "f16": np.float16}


def attend(
    cache: str,
    queries: int,
    random: Random,
    *,
    start: int,
    stop: int,
    head_dim: int,
    last: int | None = None,
    window: int = attention.EVERYTHING,
) -> Case:
    """Parts of a few queries over the positions from start to stop; all others are NaN.

    Query q sees last + q - window <= p < last + q; all of them, unless said otherwise.
    """
    width = -(-head_dim // 8) * 8
    cells = np.full((2, stop + 3, width), np.nan, _CELLS[cache])
    cells[:, start:stop] = 0
    cells[:, start:stop, :head_dim] = random.standard_normal((2, stop - start, head_dim))
    keys, values = (c[start:stop].astype(np.float64) for c in cells)
    asked = np.full((queries, width + 5), np.nan, np.float32)
    asked[:, :width] = 0
    asked[:, :head_dim] = random.standard_normal((queries, head_dim)) * 2
    query, scale = asked[:, :width].astype(np.float64), float(random.uniform(0.5, 2)) / head_dim**0.5
    last = stop if last is None else last
    position, end = np.arange(start, stop), last + np.arange(queries)[:, None]
    seen = (position < end) & (position >= end - window)
    scores = np.where(seen, scale * (query @ keys.T), -np.inf)
    with np.errstate(invalid="ignore"):  # a query that sees nothing
        largest = scores.max(axis=1, keepdims=True)
        shares = np.exp(scores - largest)
    around = np.full((queries, 9), np.nan)  # a part has room for more than there is, and the next one begins later
    total = shares.sum(axis=1, keepdims=True)
    expected = np.hstack([shares @ values, largest, total, around])
    sizes = np.hstack([shares @ np.abs(values), np.ones_like(total), total, around])
    # an error in a score is an error of the same size in its share
    tolerance = _ROUNDING * (2 + scale * (np.abs(query) @ np.abs(keys).T).max()) * sizes
    undefined = np.zeros(expected.shape, bool)
    undefined[~seen.any(axis=1), : width + 2] = True
    expected[undefined] = 0
    out, scratch = Output(expected.shape), Output((attention.SCORES,))
    arguments = (
        *(c.ctypes.data for c in cells), start, stop, last, window, asked.ctypes.data, asked.strides[0], scale,
        scratch.address, out.address, out.array.strides[0], width,
    )  # fmt: skip

    def run(_keep: object = (cells, asked)) -> None:
        getattr(attention, f"attend_{cache}_{queries}")(*arguments)

    return Case(run, (Expectation(out, expected, tolerance, undefined),), 2 * keys.size * cells.itemsize, (scratch,))


def merge(random: Random, *, width: int) -> Case:
    """Two parts of a query's attention as one."""
    parts = random.standard_normal((2, width + 8), np.float32)
    parts[:, width] *= 20
    parts[:, width + 1] = np.exp(parts[:, width + 1])
    out, (one, other) = Output((width + 2,)), parts[:, : width + 2].astype(np.float64)
    out.array[:] = one
    largest = max(one[width], other[width])
    a, b = np.exp(one[width] - largest) * one, np.exp(other[width] - largest) * other
    expected, tolerance = a + b, 5 * _ROUNDING * (np.abs(a) + np.abs(b)) + 1e-30
    expected[width], tolerance[width] = largest, 0

    def run(_keep: object = parts) -> None:
        attention.merge(out.address, parts[1].ctypes.data, width)

    return Case(run, (Expectation(out, expected, tolerance),))


def settle(random: Random, *, head_dim: int) -> Case:
    """The weighted mean from a part."""
    width = -(-head_dim // 8) * 8
    part, out = _vector(random, width + 8), Output((head_dim,))
    part[width + 1] = np.exp(part[width + 1])
    mean = part[:head_dim].astype(np.float64) / part[width + 1]

    def run(_keep: object = part) -> None:
        attention.settle(part.ctypes.data, width, head_dim, out.address)

    return Case(run, (Expectation(out, mean, _ROUNDING * np.abs(mean)),))


def remember(cache: str, random: Random, *, width: int) -> Case:
    """One key or value into its cell, rounded to the cache's type."""
    vector = _vector(random, width) * np.float32(10.0) ** random.integers(-3, 6, width).astype(np.float32)
    out = Output((width,), _CELLS[cache])
    limit = float(np.finfo(_CELLS[cache]).max)

    def run(_keep: object = vector) -> None:
        getattr(attention, f"remember_{cache}")(out.address, vector.ctypes.data, width)

    return Case(run, (Expectation(out, np.clip(vector, -limit, limit).astype(_CELLS[cache])),))


def _vector(random: Random, size: int) -> np.ndarray:
    return random.standard_normal(size, np.float32) * np.float32(2)


TABLE: dict[str, Callable[..., Case]] = {
    **{f"{f.__name__}_{w}": partial(f, w) for f in (gather_dot, gather_axpy, read_row) for w in FORMATS},
    **{f"{f.__name__}_{w}": partial(f, w) for f in (dot_tokens, down_strip) for w in FORMATS},
    **{f"attend_{c}_{queries}": partial(attend, c, queries) for c in _CELLS for queries in (1, 2, 3, 4)},
    **{f"remember_{c}": partial(remember, c) for c in _CELLS},
    "merge": merge,
    "settle": settle,
    "fit_q4": fit_q4,
    **{f"quantize_{w}": partial(quantize_vector, w) for w in ("q8", "q4")},
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "activate": activate,
    "rotate": rotate,
}
