"""The scratch memory of a forward pass, as the kernels want it: named tuples of arrays, reused from call to call.

Vectors of the hidden size are padded with zeros to a multiple of 64 elements, and heads to a multiple of 8.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fewfire.config import ModelConfig
from fewfire.kernels.decode import NEURON_CHUNKS
from fewfire.kernels.prefill import NEURONS
from fewfire.quantize import padded


class Activation:
    """One or several vectors that rows are multiplied with, as float32 and as int8; see `kernels/gather.py`."""

    def __init__(self, columns: int, tokens: int = 1) -> None:
        n = padded(columns)
        groups = n // 32
        lanes = 8 * (groups // 8 + groups % 8 // 4 + groups % 4 // 2)  # eight for each block of groups
        self.values = np.zeros((tokens, n), np.float32)
        self._arrays = (
            self.values,
            np.zeros((tokens, n), np.int8),
            np.zeros((tokens, lanes), np.float32),
            np.zeros((tokens, lanes), np.int32),
            np.zeros((tokens, 256), np.int8),
        )
        values, quants, scales, sums, scratch = (array.ctypes.data for array in self._arrays)
        self.descriptor = np.array([values, quants, scales, sums, n, lanes, scratch], np.int64)

    @property
    def quants(self) -> np.ndarray:
        """int8 `(tokens, columns padded)`, in the interleaved order of the rows."""
        return self._arrays[1]

    @property
    def scales(self) -> np.ndarray:
        """float32 `(tokens, lanes)`."""
        return self._arrays[2]

    @property
    def sums(self) -> np.ndarray:
        """int32 `(tokens, lanes)`."""
        return self._arrays[3]


class Workspace(NamedTuple):
    """Buffers of one token."""

    x: np.ndarray  # descriptor of the next input (hidden,)
    attended: np.ndarray  # descriptor of the joined heads
    joined: np.ndarray  # (heads * head_dim,) the values of `attended`
    hidden: np.ndarray  # (hidden,) the residual stream
    delta: np.ndarray  # (hidden,) what a block adds to it
    qkv: np.ndarray  # (rows of qkv,)
    query: np.ndarray  # (heads, head)
    key: np.ndarray  # (head,)
    context: np.ndarray  # (heads, head)
    gate: np.ndarray  # (threads, neurons in a chunk and 8 to spare)
    up: np.ndarray  # the same
    partial: np.ndarray  # (NEURON_CHUNKS, hidden)
    factors: np.ndarray  # (threads, scratch of gather_axpy)
    cos: np.ndarray  # (2, head_dim / 2) global, local
    sin: np.ndarray


class Batch(NamedTuple):
    """Buffers of a batch of tokens, padded to a multiple of 4 tokens."""

    x: np.ndarray  # descriptor (tokens, hidden)
    wanted: np.ndarray  # (threads, 7) descriptor of those of x whose logits are wanted
    attended: np.ndarray  # descriptor (tokens, heads * head_dim)
    joined: np.ndarray  # the values of `attended`
    hidden: np.ndarray  # (tokens, hidden)
    delta: np.ndarray  # (tokens, hidden)
    qkv: np.ndarray  # (tokens, rows of qkv)
    query: np.ndarray  # (tokens, heads, head)
    fired: np.ndarray  # (tokens, neurons) act(gate) * up
    gate: np.ndarray  # (threads, tokens, NEURONS)
    up: np.ndarray  # (threads, tokens, NEURONS)
    panel: np.ndarray  # (threads, 64 * 64)
    key: np.ndarray  # (threads, head)
    context: np.ndarray  # (threads, head)
    scores: np.ndarray  # (threads, positions and 8 to spare)
    cos: np.ndarray  # (tokens, 2, head_dim / 2)
    sin: np.ndarray


def head_width(c: ModelConfig) -> int:
    """Elements of one head in the caches."""
    return -(-c.head_dim // 8) * 8


def axpy_scratch(columns: int) -> int:
    """Floats of scratch for `gather_axpy`: the group scales of four rows, each rounded up to eight."""
    return 4 * (-(-padded(columns) // 256) * 8)


def workspace(c: ModelConfig, threads: int) -> tuple[Workspace, list[Activation]]:
    """Buffers for decoding, and the owners of the memory that their descriptors point to."""
    x, attended = Activation(c.hidden_size), Activation(c.num_attention_heads * c.head_dim)
    hidden, head = padded(c.hidden_size), head_width(c)
    neurons = -(-c.intermediate_size // NEURON_CHUNKS) + 8
    rope = (2, c.head_dim // 2 if c.rope else 0)
    work = Workspace(
        x=x.descriptor,
        attended=attended.descriptor,
        joined=attended.values[0],
        hidden=_floats(hidden),
        delta=_floats(hidden),
        qkv=_floats(_qkv_rows(c)),
        query=_floats(c.num_attention_heads, head),
        key=_floats(head),
        context=_floats(c.num_attention_heads, head),
        gate=_floats(threads, neurons),
        up=_floats(threads, neurons),
        partial=_floats(NEURON_CHUNKS, hidden),
        factors=_floats(threads, axpy_scratch(c.hidden_size)),
        cos=_floats(*rope),
        sin=_floats(*rope),
    )
    return work, [x, attended]


def batch(c: ModelConfig, threads: int, tokens: int, positions: int) -> tuple[Batch, list[Activation]]:
    """Buffers for a batch of tokens over a cache of so many positions, and the owners of their descriptors' memory."""
    x, attended = Activation(c.hidden_size, tokens), Activation(c.num_attention_heads * c.head_dim, tokens)
    hidden, head = padded(c.hidden_size), head_width(c)
    rope = (tokens, 2, c.head_dim // 2 if c.rope else 0)
    buffers = Batch(
        x=x.descriptor,
        wanted=np.zeros((threads, x.descriptor.size), np.int64),
        attended=attended.descriptor,
        joined=attended.values,
        hidden=_floats(tokens, hidden),
        delta=_floats(tokens, hidden),
        qkv=_floats(tokens, _qkv_rows(c)),
        query=_floats(tokens, c.num_attention_heads, head),
        fired=_floats(tokens, c.intermediate_size),
        gate=_floats(threads, tokens, NEURONS),
        up=_floats(threads, tokens, NEURONS),
        panel=_floats(threads, 64 * 64),
        key=_floats(threads, head),
        context=_floats(threads, head),
        scores=_floats(threads, positions + 8),
        cos=_floats(*rope),
        sin=_floats(*rope),
    )
    return buffers, [x, attended]


def _qkv_rows(c: ModelConfig) -> int:
    return (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim


def _floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)
