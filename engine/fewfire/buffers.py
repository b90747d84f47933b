"""The scratch memory of a forward pass, as records of addresses for the kernels; reused from call to call."""

from __future__ import annotations

import numpy as np

from fewfire.config import ModelConfig
from fewfire.kernels.attention import RANGE, SCORES
from fewfire.kernels.axpy import BLOCK
from fewfire.kernels.decode import WORK
from fewfire.kernels.head import LIST, head_chunks
from fewfire.kernels.neurons import NEURON_CHUNKS, longest_chunk
from fewfire.kernels.prefill import BATCH, ROWS
from fewfire.quantize import padded


def head_width(c: ModelConfig) -> int:
    """Elements of one head in the caches: head_dim padded to a multiple of 8."""
    return -(-c.head_dim // 8) * 8


def axpy_scratch(columns: int) -> int:
    """Floats of scratch for `gather_axpy`: five for each row of a block, and six for each group of columns."""
    return 5 * BLOCK + (2 + BLOCK // 2) * (-(-padded(columns) // 256) * 8)


class Activation:
    """One or several vectors that rows are multiplied with, as float32 and as integers; see `kernels/gather.py`."""

    def __init__(self, columns: int, tokens: int = 1) -> None:
        n = padded(columns)
        groups = n // 32
        lanes = 8 * (groups // 8 + groups % 8 // 4 + groups % 4 // 2)  # eight for each block of groups
        self.values = np.zeros((tokens, n), np.float32)
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
        """Sets fields that are not addresses."""
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
    """Buffers for decoding one token over so many positions, with a screened head of a rank over 0."""

    def __init__(self, c: ModelConfig, threads: int, positions: int, rank: int = 0) -> None:
        super().__init__(WORK)
        self.positions, self.rank = positions, rank
        x, attended = Activation(c.hidden_size), Activation(c.num_attention_heads * c.head_dim)
        self.activation("x", x)
        self.activation("attended", attended)
        self.point("joined", attended.values)
        hidden, head, half = padded(c.hidden_size), head_width(c), c.head_dim // 2
        longest = _lines(longest_chunk(c.intermediate_size))
        factors, scores, ranges = _lines(axpy_scratch(c.hidden_size)), _lines(SCORES), -(-positions // RANGE)
        self.number(
            longest=longest,
            factors_stride=4 * factors,
            scores_stride=4 * scores,
            parts_stride=4 * ranges * (head + 8),
        )
        self.floats(
            hidden=(hidden,),
            delta=(hidden,),
            qkv=(_qkv_rows(c),),
            query=(c.num_attention_heads, head),
            key=(head,),
            parts=(c.num_attention_heads, ranges, head + 8),
            scores=(threads, scores),
            partial=(NEURON_CHUNKS, hidden),
            cos=(2, half),
            sin=(2, half),
            gate=(threads, longest),
            up=(threads, longest),
            factors=(threads, factors),
        )
        self.point("ids", aligned((threads, longest), np.int32))
        self.point("block", aligned((threads, 4 * BLOCK), np.int32))
        self.read = np.zeros((c.num_hidden_layers, NEURON_CHUNKS, 2), np.int64)
        self.read[:, 0] = c.intermediate_size  # before the first token
        self.point("read", self.read)
        self.exact = np.zeros(head_chunks(threads), np.int64)
        self.point("exact", self.exact)
        if rank:
            reduced = Activation(rank)
            self.activation("reduced", reduced)
            self.point("screened", reduced.values)
            self.floats(largest=(head_chunks(threads),), values=(threads, LIST))
            self.point("candidates", aligned((threads, LIST), np.int32))


class Batch(Buffers):
    """Buffers for a batch of tokens (a multiple of 4)."""

    def __init__(self, c: ModelConfig, threads: int, tokens: int) -> None:
        super().__init__(BATCH)
        self.tokens = tokens
        x, attended = Activation(c.hidden_size, tokens), Activation(c.num_attention_heads * c.head_dim, tokens)
        self.activation("x", x)
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
