"""A packed model: a directory with everything the engine needs, laid out so that weights are used as they lie there.

`fewfire.json` describes it, `weights.safetensors` holds the arrays that `arrays` lists, each beginning on a page,
`tokenizer.json` and `chat_template.jinja` come from the checkpoint. Opening one checks the description against its own
digest and against the file's header and size, so a truncated or mismatched model is refused before the first token.
The digest of the weights, taken while packing, tells models apart; opening does not check it: that would take longer
than reading them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fewfire import memory
from fewfire.config import CENTRED, THRESHOLDED, ModelConfig
from fewfire.errors import CheckpointError
from fewfire.progress import Progress, silent
from fewfire.quantize import row_bytes

VERSION = 5
DESCRIPTION, WEIGHTS, TOKENIZER, TEMPLATE = (
    "fewfire.json",
    "weights.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
)
PAGE = 4096
_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.uint8): "U8"}
_PARTS = {
    "embed": ("embed", "positions"),
    "attention": ("qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias"),
    "ffn": ("gate", "gate_bias", "updown", "up_bias", "down_bias", "act_threshold", "act_centre", "bypass"),
    "head": ("head",),
}


@dataclass(frozen=True)
class Array:
    """Shape and element type of one array of a packed model. Matrices are bytes `(layers, rows, row bytes)`."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Formats(NamedTuple):
    """The number formats of a packed model's parts."""

    rows: str  # q, k, v, o, gate, up
    down: str
    table: str  # the embedding, the head, bypasses

    def matrix(self, part: str) -> str:
        """That of a matrix whose rows meet the hidden state or the joined heads: "gate", "bypass"."""
        return self.table if part == "bypass" else self.rows


_SMALL = 1024


def formats(config: ModelConfig, weights: str) -> Formats:
    """What a model packed as `weights` really uses.

    In q4, the tables and bypasses stay in q8, and so do the down rows of small models (hidden size under 1024): there
    the loss is largest for the bytes that it saves (perf/LOG.md, "q4: where four bits are too few").
    """
    if weights != "q4":
        return Formats(weights, weights, weights)
    return Formats("q4", "q8" if config.hidden_size < _SMALL else "q4", "q8")


def arrays(config: ModelConfig, weights: str) -> dict[str, Array]:
    """Every array that a packed model of this configuration and format holds, in the order of the file."""
    c, layers = config, config.num_hidden_layers
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    out: dict[str, Array] = {}

    def floats(name: str, *shape: int) -> None:
        out[name] = Array(shape, np.dtype(np.float32))

    def matrix(name: str, count: int, rows: int, row: int) -> None:
        out[name] = Array((count, rows, row), np.dtype(np.uint8))

    of = formats(config, weights)
    table, row = row_bytes(of.table, c.hidden_size), row_bytes(of.rows, c.hidden_size)
    matrix("embed", 1, c.vocab_size, table)
    if not c.tie_word_embeddings:
        matrix("head", 1, c.vocab_size, table)
    if c.rope is None:
        floats("positions", c.max_position_embeddings, c.hidden_size)
    matrix("qkv", layers, queries + 2 * keys, row)
    matrix("o", layers, c.hidden_size, row_bytes(of.rows, queries))
    matrix("gate", layers, c.intermediate_size, row)
    up = row if c.gated else 0
    matrix("updown", layers, c.intermediate_size, up + row_bytes(of.down, c.hidden_size))
    if c.qkv_bias:
        floats("qkv_bias", layers, queries + 2 * keys)
    if c.o_bias:
        floats("o_bias", layers, c.hidden_size)
    if c.ffn_bias:
        floats("gate_bias", layers, c.intermediate_size)
        floats("down_bias", layers, c.hidden_size)
        if c.gated:
            floats("up_bias", layers, c.intermediate_size)
    if c.hidden_act in THRESHOLDED:
        floats("act_threshold", layers, c.intermediate_size)
    if c.hidden_act in CENTRED:
        floats("act_centre", layers, c.intermediate_size)
        matrix("bypass", layers, c.hidden_size, table)
    if c.qk_norm:
        floats("q_norm", layers, c.head_dim)
        floats("k_norm", layers, c.head_dim)
    for name in ("attn_norm", "ffn_norm", "final_norm"):
        count = 1 if name == "final_norm" else layers
        floats(name, count, c.hidden_size)
        if c.norm == "layer":
            floats(f"{name}_bias", count, c.hidden_size)
    if c.post_norms:
        floats("attn_post_norm", layers, c.hidden_size)
        floats("ffn_post_norm", layers, c.hidden_size)
    return out


def header(contents: dict[str, Array]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of the safetensors file, and where in the file each array begins.

    The format allows no gaps, so padding up to the next page is an array of its own; there is one after the last array
    too, since kernels may read a few bytes past a row.
    """
    entries: dict[str, Any] = {}
    offsets, at = {}, 0
    for name, array in contents.items():
        offsets[name] = at
        end = at + array.nbytes
        entries[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, end],
        }
        at = end + PAGE - end % PAGE
        entries[f"padding.{name}"] = {"dtype": "U8", "shape": [at - end], "data_offsets": [end, at]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: begin + offset for name, offset in offsets.items()}


def describe(name: str, weights: str, config: ModelConfig, contents: str) -> str:
    """The text of `fewfire.json`; its digest shows damage that is still JSON. contents: a digest of all arrays."""
    content = {"version": VERSION, "name": name, "weights": weights, "config": config.to_dict(), "contents": contents}
    return json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Packed:
    """An opened packed model; `arrays` are read-only views of the file, mapped or in memory."""

    path: Path
    name: str
    config: ModelConfig
    weights: str
    arrays: dict[str, np.ndarray]
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # from the arrays, made once

    @property
    def formats(self) -> Formats:
        """The number formats of its parts."""
        return formats(self.config, self.weights)

    def parts(self) -> dict[str, int]:
        """Bytes of the embedding, attention, FFN, head and norms; a tied head has none of its own."""
        sizes = {part: sum(self._bytes(n) for n in names) for part, names in _PARTS.items()}
        sizes["norms"] = sum(a.nbytes for a in self.arrays.values()) - sum(sizes.values())
        return sizes

    def bytes_per_token(self) -> int:
        """Bytes of weights that a token reads if nothing is left out: all matrices, and a row of the embedding."""
        head = self._bytes("head") or self._bytes("embed")
        layers = sum(map(self._bytes, ("qkv", "o", "gate", "updown", "bypass")))
        return layers + head + self.arrays["embed"].shape[2]

    def _bytes(self, name: str) -> int:
        return self.arrays[name].nbytes if name in self.arrays else 0


def is_packed(path: Path) -> bool:
    """Whether a directory holds a packed model."""
    return (path / DESCRIPTION).is_file()


def open_packed(path: Path, threads: int = 0, progress: Progress = silent) -> Packed:
    """Opens a packed model. Raises `CheckpointError` if it is damaged or of another version.

    threads: how many read it into memory, if it is to run from there (see `memory.contents`); 0: it is mapped.
    """
    remedy = f"pack it again (or delete {path})"
    try:
        description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        version, weights = description["version"], description["weights"]
        if version != VERSION:
            raise CheckpointError(f"{path}: packed by another version of fewfire ({version}, not {VERSION}); {remedy}")
        if description.pop("digest") != _digest(description):
            raise ValueError("digest")
        config = ModelConfig.from_dict(description["config"])
        contents = arrays(config, weights)
        first, offsets = header(contents)
        with (path / WEIGHTS).open("rb") as file:
            if file.read(len(first)) != first:
                raise CheckpointError(f"{path}: the header of {WEIGHTS} does not fit {DESCRIPTION}; {remedy}")
            last = list(contents)[-1]
            if os.fstat(file.fileno()).st_size < offsets[last] + contents[last].nbytes + 1:
                raise CheckpointError(f"{path}: {WEIGHTS} is truncated; {remedy}")
            data = memory.contents(file, threads, progress)
        views = {
            name: np.frombuffer(data.data, a.dtype, math.prod(a.shape), offsets[name]).reshape(a.shape)
            for name, a in contents.items()
        }
        return Packed(path, str(description["name"]), config, weights, views)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the packed model ({error.strerror}); {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(f"{path}: {DESCRIPTION} is damaged; {remedy}") from None
