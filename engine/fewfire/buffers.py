"""The scratch memory of a forward pass, as records of addresses for the kernels; reused from call to call."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import ArrayLike

from fewfire.config import CENTRED, ModelConfig
from fewfire.kernels.attention import RANGE, SCORES
from fewfire.kernels.axpy import BLOCK
from fewfire.kernels.columns import COLUMN_CHUNKS, longest_list
from fewfire.kernels.head import LIST
from fewfire.kernels.prefill import BATCH, ROWS
from fewfire.kernels.select import NEURON_CHUNKS, longest_chunk
from fewfire.kernels.work import HEAD_CHUNKS, WORK
from fewfire.quantize import padded
from fewfire.selectors.selection import COLUMNS, Selection, column_shape


def head_width(c: ModelConfig) -> int:
    """Elements of one head in the caches: head_dim padded to a multiple of 8."""
    return -(-c.head_dim // 8) * 8


def axpy_scratch(columns: int) -> int:
    """Floats of scratch for `gather_axpy`: five for each row of a block, and six for each group of columns."""
    return 5 * BLOCK + (2 + BLOCK // 2) * (-(-padded(columns) // 256) * 8)


class Activation:
    """One or several vectors that rows are multiplied with, as float32 and as integers; see `kernels/gather.py`."""

    def __init__(self, columns: int, tokens: int = 1, of: Activation | None = None) -> None:
        """of: whose values these are, as other integers."""
        n = padded(columns)
        groups = n // 32
        lanes = 8 * (groups // 8 + groups % 8 // 4 + groups % 4 // 2)  # eight for each block of groups
        self.values: np.ndarray = np.zeros((tokens, n), np.float32) if of is None else of.values
        self._quants = np.zeros((tokens, n), np.int16)
        self.scales = np.zeros((tokens, lanes), np.float32)
        self.sums = np.zeros((tokens, lanes), np.float32)
        self._scratch = np.zeros((tokens, 512), np.int8)
        parts = (self.values, self._quants, self.scales, self.sums)
        self.descriptor = np.array([*(p.ctypes.data for p in parts), n, lanes, self._scratch.ctypes.data], np.int64)

    def quants(self, weights: str) -> np.ndarray:
        """The integers that rows of a format meet, `(tokens, columns padded)`: int16 for q8, int8 for q4."""
        if weights == "q8":
            return self._quants
        return self._quants.view(np.int8).reshape(-1)[: self._quants.size].reshape(self._quants.shape)


def aligned(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """Zeros that begin with a pair of cache lines, so that threads whose parts are whole pairs share none."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 128, np.uint8)
    return memory[-memory.ctypes.data % 128 :][:size].view(dtype).reshape(shape)


class Buffers:
    """A record of addresses and the arrays that they point to, which live as long as this."""

    def __init__(self, dtype: np.dtype) -> None:
        self.record = np.zeros(1, dtype)
        self._owned: list[object] = []

    def number(self, **values: int) -> None:
        """Sets fields to numbers, or to addresses of what lives as long as this."""
        for name, value in values.items():
            self.record[name] = value

    def floats(self, **shapes: tuple[int, ...]) -> None:
        """Sets fields to new float32 arrays of zeros."""
        for name, shape in shapes.items():
            self.point(name, aligned(shape))

    def point(self, name: str, array: np.ndarray) -> None:
        """Sets a field to an array, which is kept."""
        self.record[name] = array.ctypes.data
        self._owned.append(array)

    def point_each(self, name: str, array: np.ndarray, where: ArrayLike = True) -> None:
        """Sets a field of record i to `array[i]`, for all records or some."""
        addresses = array.ctypes.data + array.strides[0] * np.arange(len(array))
        self.record[name] = np.where(where, addresses, self.record[name])
        self._owned.append(array)

    def activation(self, name: str, activation: Activation) -> None:
        """Sets a field to an activation's descriptor, and keeps the activation."""
        self.point(name, activation.descriptor)
        self._owned.append(activation)


def _lines(floats: int) -> int:
    """So many floats and what is missing to whole pairs of cache lines."""
    return -(-floats // 32) * 32


def _qkv_rows(c: ModelConfig) -> int:
    return (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim


class Workspace(Buffers):
    """Buffers for decoding one token over a cache of up to so many positions, with or without a selection."""

    def __init__(self, c: ModelConfig, threads: int, positions: int, selection: Selection | None = None) -> None:
        super().__init__(WORK)
        self.positions = positions
        x, attended = Activation(c.hidden_size), Activation(c.num_attention_heads * c.head_dim)
        self.activation("x", x)
        if c.hidden_act in CENTRED:
            self.activation("wide", Activation(c.hidden_size, of=x))
        self.activation("attended", attended)
        self.point("joined", attended.values)
        hidden, head, half = padded(c.hidden_size), head_width(c), c.head_dim // 2
        predictor = selection.predictor if selection else None
        # Projections by columns may need more; memory that nobody touches costs nothing.
        inputs, outputs = (max(sizes) for sizes in zip(*(column_shape(c, part) for part in COLUMNS), strict=True))
        chunk = longest_chunk(c.intermediate_size, predictor.group_size if predictor else 1)
        longest = _lines(max(chunk, longest_list(inputs)))
        factors, scores, ranges = _lines(axpy_scratch(outputs)), _lines(SCORES), -(-positions // RANGE)
        self.number(
            longest=longest,
            factors_stride=4 * factors,
            scores_stride=4 * scores,
            parts_stride=4 * ranges * (head + 8),
        )
        self.floats(
            hidden=(hidden,),
            delta=(hidden,),
            qkv=(padded(_qkv_rows(c)),),
            query=(c.num_attention_heads, head),
            key=(head,),
            parts=(c.num_attention_heads, ranges, head + 8),
            scores=(threads, scores),
            partial=(max(NEURON_CHUNKS * hidden, COLUMN_CHUNKS * padded(outputs)),),
            gates=(padded(column_shape(c, "ffn")[1]) + 8,),
            ups=(c.intermediate_size + 8,),
            least=(1,),
            cos=(2, half),
            sin=(2, half),
            gate=(threads, longest),
            up=(threads, longest),
            factors=(threads, factors),
        )
        self.point("ids", aligned((threads, longest), np.int32))
        self.point("block", aligned((threads, 4 * BLOCK), np.int32))
        if predictor and predictor.basis is not None:
            hint = Activation(predictor.basis.shape[1])
            self.activation("hint", hint)
            self.point("hint_values", hint.values)
        self.read = np.zeros((c.num_hidden_layers, NEURON_CHUNKS, 3), np.int64)
        self.read[:, 0] = c.intermediate_size  # before the first token
        self.point("read", self.read)
        self.exact = np.zeros(HEAD_CHUNKS, np.int64)
        self.point("exact", self.exact)
        if selection and selection.screen:
            self.point("reduced", aligned((selection.screen.rank,), np.int8))
            self.floats(
                inner=(selection.screen.rank,),
                affine=(3,),
                largest=(HEAD_CHUNKS,),
                totals=(HEAD_CHUNKS,),
                values=(threads, LIST),
            )
            self.point("candidates", aligned((threads, LIST), np.int32))
        self.bytes = ctypes.c_int64()  # quicker to read than an array
        self.number(bytes=ctypes.addressof(self.bytes))
        self.projected = np.zeros((c.num_hidden_layers, 3, COLUMN_CHUNKS), np.int64)
        self.point("projected", self.projected)


class Batch(Buffers):
    """Buffers for a batch of tokens (a multiple of 4), of a model that may have been trained with a selection."""

    def __init__(self, c: ModelConfig, threads: int, tokens: int, selection: Selection | None = None) -> None:
        super().__init__(BATCH)
        self.tokens = tokens
        x, attended = Activation(c.hidden_size, tokens), Activation(c.num_attention_heads * c.head_dim, tokens)
        self.activation("x", x)
        if c.hidden_act in CENTRED:
            self.activation("wide", Activation(c.hidden_size, tokens, x))
        self.activation("attended", attended)
        self.point("joined", attended.values)
        self.point("wanted", np.zeros((threads, x.descriptor.size), np.int64))
        hidden, head, half = padded(c.hidden_size), head_width(c), c.head_dim // 2
        parts = 4 * (c.num_attention_heads // c.num_key_value_heads + 1)
        self.number(
            tokens=tokens,
            joined_stride=attended.values.strides[0],
            chunk_stride=4 * tokens * ROWS,
            key_stride=4 * head,
            parts_stride=4 * parts * (head + 8),
            scores_stride=4 * SCORES,
        )
        self.floats(
            hidden=(tokens, hidden),
            delta=(tokens, hidden),
            qkv=(tokens, _qkv_rows(c)),
            query=(tokens, c.num_attention_heads, head),
            fired=(tokens, c.intermediate_size),
            cos=(tokens, 2, half),
            sin=(tokens, 2, half),
            gate=(threads, tokens, ROWS),
            up=(threads, tokens, ROWS),
            panel=(threads, 64, 64),
            key=(threads, head),
            parts=(threads, parts, head + 8),
            scores=(threads, SCORES),
        )
        if selection and selection.trained and selection.top is not None:
            self.floats(gates=(tokens, c.intermediate_size))
        if selection and selection.trained and selection.predictor:
            self.floats(routes=(tokens, selection.predictor.bias.shape[1]))
