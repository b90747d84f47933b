"""From a packed model to kernel calls: the kernels' view of the model, and the calls themselves.

An `Engine` is shared by all sessions of a model; a lock lets one forward pass run at a time, on all threads. Whoever
borrows the engine to try selections holds that lock, and gives back what was selected.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fewfire.buffers import Batch, Buffers, Workspace, head_width
from fewfire.config import ACTIVATIONS, EXACT_ZEROS, THRESHOLDED
from fewfire.kernels import attention, axpy, dense, gather, pointwise, rows
from fewfire.kernels.compile import Compiled, Primitive
from fewfire.kernels.decode import decode
from fewfire.kernels.dense import TOKENS
from fewfire.kernels.gather import SOON
from fewfire.kernels.layer import CACHE, MODEL
from fewfire.kernels.prefill import ROWS, prefill
from fewfire.layers import layer_records
from fewfire.packed import Packed
from fewfire.progress import Progress, silent
from fewfire.quantize import padded, row_bytes
from fewfire.selectors.parts import fitting
from fewfire.selectors.selection import COLUMNS, Screen, Selection, column_shape
from fewfire.selectors.steps import steps
from fewfire.team import Team
from fewfire.traffic import Traffic

BATCH = 256  # tokens of a prompt that go through the layers together


class KVCache(Buffers):
    """Keys and values of one session, bytes `(layers, kv_heads, capacity, bytes of one head)` each.

    And the neurons `(layers, neurons)` that stay kept until its window of tokens ends.
    """

    def __init__(self, layers: int, heads: int, capacity: int, cell: int, neurons: int) -> None:
        super().__init__(CACHE)
        self.capacity = capacity
        shape = (layers, heads, capacity, cell)
        self.keys, self.values = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
        self.kept, self._next, self._window = np.zeros((layers, neurons), np.uint8), -1, 1
        self.number(capacity=capacity)
        self.point("keys", self.keys)
        self.point("values", self.values)

    def grown(self, capacity: int, used: int) -> KVCache:
        """A larger copy; only the first `used` positions matter."""
        layers, heads, _, cell = self.keys.shape
        larger = KVCache(layers, heads, capacity, cell, self.kept.shape[1])
        larger._look_back(self._window)
        larger.kept[:], larger._next = self.kept, self._next
        larger.keys[:, :, :used] = self.keys[:, :, :used]
        larger.values[:, :, :used] = self.values[:, :, :used]
        return larger

    def keep(self, position: int, window: int) -> None:
        """Prepares for the token at `position`: what is kept is that of the tokens before it in its window.

        If the token before it was not decoded just now, or with another window, then of none, so that it does not
        matter what was read and taken back.
        """
        if window != self._window:
            self._look_back(window)
        if window > 1:
            if position % window == 0 or position != self._next:
                self.kept[:] = 0
            self._next = position + 1

    def _look_back(self, window: int) -> None:
        self._window, self._next = 0, -1  # so that it is done again if it is interrupted
        self.number(kept=self.kept.ctypes.data if window > 1 else 0)
        self._window = window


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
        self._lock = threading.RLock()
        group = packed.config.num_attention_heads // packed.config.num_key_value_heads
        # Cached keys and values are as exact as the weights deserve.
        self._cache_format = "f32" if packed.weights in ("f32", "bf16") else "f16"
        self._cell = head_width(packed.config) * (4 if self._cache_format == "f32" else 2)
        self._primitives = _primitives(packed, self._cache_format, group % attention.QUERIES)
        self._packed = packed  # owns the weights
        self._use(selection, dense, 0, progress)

    @property
    def threads(self) -> int:
        """Threads that a forward pass runs on."""
        return self._team.threads

    def select(self, selection: Selection | None, dense: bool = False, progress: Progress = silent) -> None:
        """What decoding leaves out from now on, and prefill if the model was trained so.

        Without a selection, what a ReLU makes zero, unless it is to be dense. Steps that no process has needed before
        are compiled, which is reported.

        Raises `ValueError` for a selection that does not fit the model.
        """
        with self._lock:
            self._use(selection, dense, self._work.positions, progress)

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[None]:
        """For this thread alone: sessions in others wait. What it selects is undone at the end, however that comes."""
        with self._lock:
            before = self._selection, self._dense
            try:
                yield
            finally:
                self.select(*before)

    @property
    def method(self) -> str:
        """What decides at present what is left out: a selection's method, "exact" for a ReLU's zeros, or "dense"."""
        if self._selection:
            return self._selection.method
        return "exact" if self.config.hidden_act in EXACT_ZEROS and not self._dense else "dense"

    def _use(self, selection: Selection | None, dense: bool, positions: int, progress: Progress) -> None:
        """Makes the records and the buffers for a selection, and compiles what is not yet there."""
        selection = fitting(self._packed, selection) if selection else None
        layers = layer_records(self._packed, selection, dense)
        screen = selection.screen if selection and selection.screen and selection.screen.margin < np.inf else None
        called = steps(layers.record, screen is not None, selection is not None and selection.trained)
        primitives = self._primitives | called
        _compile([*primitives.values(), decode, prefill], progress)
        model = _model(self._packed, primitives, self._cell, screen)
        work = Workspace(self.config, self.threads, positions, selection)
        batch = Batch(self.config, self.threads, TOKENS, selection)
        traffic = Traffic(self._packed, selection, model.record[0], layers.record)
        # All of this may be interrupted: up to here nothing is changed, and what belongs together is changed together.
        self._layers, self._model, self._work, self._batch, self._traffic = layers, model, work, batch, traffic
        self._selection, self._dense = selection, dense
        self._bytes = self._packed.bytes_per_token()

    def neurons_read(self) -> np.ndarray:
        """How many neurons' gate, up and down rows the last decoded token read, `(layers, 3)` int64.

        Counted by the kernels. In a model without up, the second is how many neurons' down rows might have been read.
        All of them before the first token.
        """
        return self._work.read.sum(axis=1)

    def bytes_read(self) -> int:
        """Bytes of weights that the last decoded token of any session read, with all that a selection adds.

        What a dense token reads before the first. Sessions keep their own (`Session.bytes_read`).
        """
        return self._bytes

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache: float16, or float32 for f32 and bf16 weights."""
        c = self.config
        return KVCache(c.num_hidden_layers, c.num_key_value_heads, capacity, self._cell, c.intermediate_size)

    def decode(self, token: int, position: int, cache: KVCache, logits: np.ndarray) -> int:
        """Reads one token at `position`, within the cache's capacity; writes its logits, float32 and contiguous.

        Returns how many bytes of weights it read.
        """
        with self._lock:
            if self._work.positions < cache.capacity:
                self._work = Workspace(self.config, self.threads, cache.capacity, self._selection)
            work = self._work
            cache.keep(position, self._selection.window if self._selection else 1)
            self._team.run(
                decode, self._model.record, self._layers.record, work.record, cache.record,
                token, position, logits, keep=(self, self._model, self._layers, work, cache),
            )  # fmt: skip
            self._bytes = self._traffic.of(work)
            return self._bytes

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
                self._batch = Batch(self.config, self.threads, count, self._selection)
            batch = self._batch
            self._team.run(
                prefill, self._model.record, self._layers.record, batch.record, cache.record,
                ids, position, rows, out, keep=(self, self._model, self._layers, batch, cache),
            )  # fmt: skip
        if out is not logits:
            logits[:] = out[rows - padding - len(logits) : rows - padding]


_QUANTIZERS = {"q4": pointwise.quantize_q4, "q8": pointwise.quantize_q8}


def _primitives(packed: Packed, cache: str, rest: int) -> dict[str, Primitive]:
    """The primitives for a model's number formats, by their fields in the model's record.

    `rest` is how many heads of a group are left if they meet the cache four at a time.
    """
    of = packed.formats
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
    for name in ("rms_norm", "rotate", "activate"):
        primitives[name] = getattr(pointwise, name)
    if any(name.endswith("norm_bias") for name in packed.arrays):
        primitives["layer_norm"] = pointwise.layer_norm
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


def _model(packed: Packed, primitives: Mapping[str, Primitive], cell: int, screen: Screen | None) -> Buffers:
    """The record of a model, and of the screen of its head if there is one."""
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
        activation=ACTIVATIONS.index(THRESHOLDED.get(c.hidden_act, c.hidden_act)),
        act_on_up=c.act_on_up,
        gated=c.gated,
        norm_relu=c.norm_relu,
        rope_half=c.head_dim // 2 if c.rope else 0,
        table_integer=1 if packed.formats.table == "q4" else 2,
        table_stride=arrays["embed"].strides[1],
        down=arrays["gate"].strides[1] if c.gated else 0,
        **{f"{part}_column": row_bytes(packed.formats.down, column_shape(c, part)[1]) for part in COLUMNS},
        **strides,
    )
    model.record["eps"], model.record["attention_scale"] = c.norm_eps, c.scale
    model.record["embedding_scale"] = c.embedding_scale
    for name in ("embed", "positions", "final_norm", "final_norm_bias"):
        if name in arrays:
            model.point(name, arrays[name])
    model.point("head", arrays.get("head", arrays["embed"]))
    if c.rope:
        kinds = [rope.inverse_frequencies(c.head_dim) for rope in (c.rope, c.rope_local or c.rope)]
        model.point("frequencies", np.stack(kinds))
    if screen:
        model.point("screen", screen.codes)
        for name in ("scales", "basis", "centre", "bias"):
            model.point(f"screen_{name}", getattr(screen, name))
        model.number(screen_rank=screen.rank, screen_stride=screen.codes.strides[0])
        model.record["screen_margin"] = screen.margin
    longest = max(*(a.shape[1] for a in arrays.values() if a.ndim == 3), screen.rank if screen else 0)
    model.point("every", np.arange(longest + max(SOON, ROWS), dtype=np.int32))
    return model
