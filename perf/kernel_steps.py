"""The small kernels beside the few lines of NumPy that say what they compute: norms, activations, RoPE, attention.

As `kernel_table.py`, which lists them.
"""

from __future__ import annotations

import numpy as np

from fewfire import quantize
from fewfire.kernels import attention, encode, pointwise
from fewfire.quantize import GROUP
from perf.kernel_case import ROUNDING, Case, Expectation, Output, Random


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

    return Case(run, (Expectation(out, values, ROUNDING * np.abs(values) + 1e-30),))


def layer_norm(random: Random, *, columns: int, eps: float = 1e-5) -> Case:
    """(x - mean) / sqrt(var + eps) * weight + bias."""
    x, weight, bias, out = *(_vector(random, columns) for _ in range(3)), Output((columns,))
    x += 3
    wide = x.astype(np.float64)
    scaled = (wide - wide.mean()) / np.sqrt(wide.var() + eps) * weight
    arguments = (x.ctypes.data, weight.ctypes.data, bias.ctypes.data, eps, columns, out.address)

    def run(_keep: object = (x, weight, bias)) -> None:
        pointwise.layer_norm(*arguments)

    return Case(run, (Expectation(out, scaled + bias, ROUNDING * (np.abs(scaled) + np.abs(bias))),))


def activate(random: Random, *, kind: int, count: int, row: int = 0, centred: bool = False) -> Case:
    """The activation function, in place; it may overwrite the seven values that follow.

    With a `row`, what is not over its threshold becomes zero, if `centred` less a centre; every so many values have the
    same list of thresholds and of centres.
    """
    out = Output((count,), spare=28)
    out.array[:] = random.standard_normal(count, np.float32) * 5
    special = np.array([0, -0.0, 1e-30, -1e-30, 90, -90, 3e4, -3e4, 1e15, -1e15, np.nan], np.float32)
    out.array[: min(count, special.size)] = special[:count]
    least = np.abs(random.standard_normal(3 * row, np.float32))
    listed = random.permutation(3 * row)[:row].astype(np.int32)
    ids = np.append(listed, listed[-1:].repeat(7))
    least[listed[8:9]] = special[8]  # what equals its threshold is not over it
    centre = random.standard_normal(3 * row, np.float32) * np.float32(0.1)
    centre[listed[:9]] = 0
    x = out.array.astype(np.float64)
    with np.errstate(over="ignore"):
        values = {
            pointwise.SILU: lambda: x / (1 + np.exp(-x)),
            pointwise.GELU_TANH: lambda: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
            pointwise.RELU: lambda: np.maximum(x, 0),
            pointwise.RELU2: lambda: np.maximum(x, 0) ** 2,
        }[kind]()
    if kind in (pointwise.RELU, pointwise.RELU2):
        values = np.nan_to_num(values, nan=0.0, posinf=np.inf)
    if centred:
        values = values - np.resize(centre[listed], count)
    if row:
        values = np.where(np.abs(values) <= np.resize(least[listed], count), 0, values)
    lists = centre.ctypes.data if centred else 0, least.ctypes.data if row else 0, ids.ctypes.data
    arguments = (kind, out.address, count, *lists, row)

    def run(_keep: object = (centre, least, ids)) -> None:
        pointwise.activate(*arguments)

    return Case(run, (Expectation(out, values, ROUNDING * (np.abs(values) + centred) + 1e-7),))


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

    return Case(run, (Expectation(out, np.concatenate([turned.real, turned.imag]), ROUNDING * sizes),))


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


CELLS: dict[str, type[np.floating]] = {"f32": np.float32, "f16": np.float16}


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
    cells = np.full((2, stop + 3, width), np.nan, CELLS[cache])
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
    tolerance = ROUNDING * (2 + scale * (np.abs(query) @ np.abs(keys).T).max()) * sizes
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
    expected, tolerance = a + b, 5 * ROUNDING * (np.abs(a) + np.abs(b)) + 1e-30
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

    return Case(run, (Expectation(out, mean, ROUNDING * np.abs(mean)),))


def remember(cache: str, random: Random, *, width: int) -> Case:
    """One key or value into its cell, rounded to the cache's type."""
    vector = _vector(random, width) * np.float32(10.0) ** random.integers(-3, 6, width).astype(np.float32)
    out = Output((width,), CELLS[cache])
    limit = float(np.finfo(CELLS[cache]).max)

    def run(_keep: object = vector) -> None:
        getattr(attention, f"remember_{cache}")(out.address, vector.ctypes.data, width)

    return Case(run, (Expectation(out, np.clip(vector, -limit, limit).astype(CELLS[cache])),))


def _vector(random: Random, size: int) -> np.ndarray:
    return random.standard_normal(size, np.float32) * np.float32(2)
