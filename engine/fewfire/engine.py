"""From a packed model to kernel calls: the kernels' view of the model, and the calls themselves.

An `Engine` is shared by all sessions of a model; a lock lets one forward pass run at a time, on all threads.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np

from fewfire.buffers import Batch, Buffers, Workspace, head_width
from fewfire.config import ACTIVATIONS, EXACT_ZEROS
from fewfire.kernels import attention, axpy, dense, gather, pointwise, rows
from fewfire.kernels.compile import Compiled, Primitive
from fewfire.kernels.decode import decode
from fewfire.kernels.dense import TOKENS
from fewfire.kernels.gather import SOON
from fewfire.kernels.layer import CACHE, LAYER, MODEL
from fewfire.kernels.prefill import prefill
from fewfire.packed import Formats, Packed
from fewfire.progress import Progress, silent
from fewfire.quantize import padded, row_bytes
from fewfire.selectors.selection import COLUMNS, Columns, Selection, column_shape
from fewfire.team import Team

BATCH = 256  # tokens of a prompt that go through the layers together


class KVCache(Buffers):
    """Keys and values of one session, bytes `(layers, kv_heads, capacity, bytes of one head)` each."""

    def __init__(self, layers: int, heads: int, capacity: int, cell: int) -> None:
        super().__init__(CACHE)
        self.capacity = capacity
        shape = (layers, heads, capacity, cell)
        self.keys, self.values = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
        self.number(capacity=capacity)
        self.point("keys", self.keys)
        self.point("values", self.values)

    def grown(self, capacity: int, used: int) -> KVCache:
        """A larger copy; only the first `used` positions matter."""
        layers, heads, _, cell = self.keys.shape
        larger = KVCache(layers, heads, capacity, cell)
        larger.keys[:, :, :used] = self.keys[:, :, :used]
        larger.values[:, :, :used] = self.values[:, :, :used]
        return larger


class Engine:
    """Runs a packed model's forward pass."""

    def __init__(
        self,
        packed: Packed,
        threads: int,
        progress: Progress = silent,
        dense: bool = False,
        selection: Selection | None = None,
    ) -> None:
        self.config = packed.config
        self._team = Team(threads)
        self._lock = threading.Lock()
        group = packed.config.num_attention_heads // packed.config.num_key_value_heads
        # Cached keys and values are as exact as the weights deserve.
        self._cache_format = "f32" if packed.weights in ("f32", "bf16") else "f16"
        self._cell = head_width(packed.config) * (4 if self._cache_format == "f32" else 2)
        self._primitives = _primitives(packed.formats, self._cache_format, group % attention.QUERIES)
        _compile([*self._primitives.values(), decode, prefill], progress)
        self._model = _model(packed, self._primitives, self._cell)
        self._packed = packed  # owns the mapped weights
        self._layers = _layers(packed, selection, dense)
        self._work = Workspace(packed.config, threads, 0)
        self._work.projected[..., 0] = [packed.arrays[name][0].nbytes for name in ("qkv", "o", "gate")]
        self._batch = Batch(packed.config, threads, TOKENS)

    @property
    def threads(self) -> int:
        """Threads that a forward pass runs on."""
        return self._team.threads

    def select(self, selection: Selection | None, dense: bool = False) -> None:
        """What decoding leaves out from now on. Without a selection, what a ReLU makes zero, unless it is to be dense.

        Raises `ValueError` for a selection that does not fit the model, or has parts that decoding cannot use.
        """
        layers = _layers(self._packed, selection, dense)
        with self._lock:
            self._layers = layers

    def neurons_read(self) -> np.ndarray:
        """How many neurons' up rows (none, if the model has no up), and how many down rows, the last token read.

        `(layers, 2)` int64, counted by the kernels: of a model without up, the first counts neurons that passed the
        gate. All of them before the first decoded token.
        """
        return self._work.read.sum(axis=1)

    def bytes_read(self) -> int:
        """Bytes of weights that the last decoded token read; all of them before the first."""
        arrays, up = self._packed.arrays, int(self._model.record["down"][0])
        fired, kept = (int(n) for n in self.neurons_read().sum(axis=0))
        always = int(self._work.projected.sum()) + arrays["embed"].shape[2]
        head = arrays.get("head", arrays["embed"]).nbytes
        return always + head + up * fired + (arrays["updown"].shape[2] - up) * kept

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache: float16, or float32 for f32 and bf16 weights."""
        return KVCache(self.config.num_hidden_layers, self.config.num_key_value_heads, capacity, self._cell)

    def decode(self, token: int, position: int, cache: KVCache, logits: np.ndarray) -> None:
        """Reads one token at `position`, within the cache's capacity; writes its logits, float32 and contiguous."""
        with self._lock:
            if self._work.positions < cache.capacity:
                self._work = Workspace(self.config, self.threads, cache.capacity)
            work = self._work
            self._team.run(
                decode, self._model.record, self._layers.record, work.record, cache.record,
                token, position, logits.ctypes.data, keep=(self, work, cache, logits),
            )  # fmt: skip

    def prefill(self, tokens: Sequence[int], position: int, cache: KVCache, logits: np.ndarray) -> None:
        """Reads at most `BATCH` tokens from `position` on, within the cache's capacity.

        Writes the logits of the last tokens, as many as `logits` has rows, `(1 or more, vocab)` float32 and contiguous.
        """
        ids = np.asarray(tokens, np.int32)
        count = -(-ids.size // TOKENS) * TOKENS
        padding = count - ids.size
        rows = -(-(len(logits) + padding) // TOKENS) * TOKENS
        # The kernel's rows end with those of the padding.
        out = logits if rows == len(logits) else np.empty((rows, self.config.vocab_size), np.float32)
        with self._lock:
            if self._batch.tokens != count:
                self._batch = Batch(self.config, self.threads, count)
            batch = self._batch
            self._team.run(
                prefill, self._model.record, self._layers.record, batch.record, cache.record,
                ids, position, rows, out.ctypes.data, keep=(self, batch, cache, out),
            )  # fmt: skip
        if out is not logits:
            logits[:] = out[rows - padding - len(logits) : rows - padding]


_QUANTIZERS = {"q4": pointwise.quantize_q4, "q8": pointwise.quantize_q8}


def _primitives(of: Formats, cache: str, rest: int) -> dict[str, Primitive]:
    """The primitives for a model's number formats, by their fields in the model's record.

    `rest` is how many heads of a group are left if they meet the cache four at a time.
    """
    primitives = {
        "gather_dot": getattr(gather, f"gather_dot_{of.rows}"),
        "gather_axpy": getattr(axpy, f"gather_axpy_{of.down}"),
        "dot_tokens": getattr(dense, f"dot_tokens_{of.rows}"),
        "down_strip": getattr(dense, f"down_strip_{of.down}"),
        "table_dot": getattr(gather, f"gather_dot_{of.table}"),
        "table_tokens": getattr(dense, f"dot_tokens_{of.table}"),
        "table_row": getattr(rows, f"read_row_{of.table}"),
        "attend": getattr(attention, f"attend_{cache}_4"),
        "merge": attention.merge,
        "settle": attention.settle,
        "remember": getattr(attention, f"remember_{cache}"),
    }
    if rest:
        primitives["attend_rest"] = getattr(attention, f"attend_{cache}_{rest}")
    for name in ("rms_norm", "layer_norm", "rotate", "activate"):
        primitives[name] = getattr(pointwise, name)
    for name, weights in (("quantize", of.rows), ("table_quantize", of.table)):
        if weights in _QUANTIZERS:
            primitives[name] = _QUANTIZERS[weights]
    return primitives


def _compile(compiled: Sequence[Compiled], progress: Progress) -> None:
    """Compiles what earlier processes have not left on disk, reporting it: that takes seconds each."""
    missing = [each for each in compiled if not each.cached]
    for done, each in enumerate(missing):
        progress("compiling kernels for this CPU (only once)", done, len(missing))
        each.compile()


def _model(packed: Packed, primitives: Mapping[str, Primitive], cell: int) -> Buffers:
    """The record of a model."""
    c, arrays = packed.config, packed.arrays
    model = Buffers(MODEL)
    model.number(**{name: primitive.address for name, primitive in primitives.items()})
    strides = {f"{name}_stride": arrays[name].strides[1] for name in ("qkv", "o", "gate", "updown")}
    model.number(
        layers=c.num_hidden_layers,
        hidden=c.hidden_size,
        width=padded(c.hidden_size),
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        head_width=head_width(c),
        cell=cell,
        neurons=c.intermediate_size,
        vocab=c.vocab_size,
        activation=ACTIVATIONS.index(c.hidden_act),
        act_on_up=c.act_on_up,
        gated=c.gated,
        rope_half=c.head_dim // 2 if c.rope else 0,
        table_integer=1 if packed.formats.table == "q4" else 2,
        table_stride=arrays["embed"].strides[1],
        down=arrays["gate"].strides[1] if c.gated else 0,
        **{f"{part}_column": row_bytes(packed.formats.down, column_shape(c, part)[1]) for part in COLUMNS},
        **strides,
    )
    model.record["act_threshold"] = c.act_threshold if c.hidden_act == "fatrelu" else 0.0
    model.record["eps"], model.record["attention_scale"] = c.norm_eps, c.scale
    model.record["embedding_scale"] = c.embedding_scale
    for name in ("embed", "positions", "final_norm", "final_norm_bias"):
        if name in arrays:
            model.point(name, arrays[name])
    model.point("head", arrays.get("head", arrays["embed"]))
    if c.rope:
        kinds = [rope.inverse_frequencies(c.head_dim) for rope in (c.rope, c.rope_local or c.rope)]
        model.point("frequencies", np.stack(kinds))
    longest = max(a.shape[1] for a in arrays.values() if a.ndim == 3)
    model.point("every", np.arange(longest + SOON, dtype=np.int32))
    return model


def _thresholds(packed: Packed, selection: Selection | None) -> dict[str, np.ndarray]:
    """The thresholds of a selection by name, checked; nothing without one."""
    shape, found = (packed.config.num_hidden_layers, packed.config.intermediate_size), {}
    for name, value in vars(selection).items() if selection else ():
        if name in ("gate", "down") and value is not None:
            if value.shape != shape or value.dtype != np.float32:
                raise ValueError(f"{name}: thresholds must be float32 {shape}, not {value.dtype} {value.shape}")
            found[name] = np.ascontiguousarray(value)
        elif name not in ("method", *COLUMNS) and value not in (None, 1):
            raise ValueError(f"decoding cannot use {name!r} of a selection")
    return found


def _layers(packed: Packed, selection: Selection | None, dense: bool) -> Buffers:
    """One record per layer, with the thresholds of the selection; `dense` needs none of either kind."""
    c, arrays, count = packed.config, packed.arrays, packed.config.num_hidden_layers
    layers = Buffers(LAYER)
    layers.record = np.zeros(count, LAYER)
    for name in LAYER.fields or ():
        if name in arrays:
            layers.record[name] = arrays[name].ctypes.data + arrays[name].strides[0] * np.arange(count)
    layers.record["window"] = [c.window(i) for i in range(count)]
    layers.record["local"] = layers.record["window"] > 0 if c.rope_local else 0
    layers.point("active", np.arange(c.intermediate_size, dtype=np.int32))
    if c.hidden_act in EXACT_ZEROS and not dense:
        layers.point("gate_least", np.zeros(c.intermediate_size, np.float32))
    for name, least in _thresholds(packed, selection).items():
        layers.point(f"{name}_least", least)
        # A layer that keeps everything is not tested, and so the same bits as without a selection.
        addresses = least.ctypes.data + least.strides[0] * np.arange(count)
        layers.record[f"{name}_least"] = np.where((least < 0).all(axis=1), 0, addresses)
    for name in COLUMNS:
        part = getattr(selection, name, None)
        if part is not None:
            _by_columns(packed, layers, name, part)
    return layers


def _by_columns(packed: Packed, layers: Buffers, name: str, part: Columns) -> None:
    """Sets a projection's fields in the layers that leave out any of its columns; the others read rows, as ever."""
    inputs, outputs = column_shape(packed.config, name)
    shape = packed.config.num_hidden_layers, inputs
    stored = (*shape, row_bytes(packed.formats.down, outputs))
    for what, array, dtype, size in (
        ("columns", part.columns, np.uint8, stored),
        ("thresholds", part.thresholds, np.float32, shape),
    ):
        if array.shape != size or array.dtype != dtype:
            raise ValueError(f"{name}: {what} must be {np.dtype(dtype)} {size}, not {array.dtype} {array.shape}")
    by_rows = (part.thresholds < 0).all(axis=1)
    for field, array in (("columns", part.columns), ("least", part.thresholds)):
        array = np.ascontiguousarray(array)
        layers.point(f"{name}_{field}", array)
        layers.record[f"{name}_{field}"] = np.where(
            by_rows, 0, array.ctypes.data + array.strides[0] * np.arange(shape[0])
        )
