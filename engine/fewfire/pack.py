"""Packing: checkpoint in, packed model out.

Streams: one matrix of one layer (or a run of rows of the embedding) is in memory at a time. Everything is written under
a temporary name next to the target and renamed at the end, so a packed model is never half there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fewfire import packed, quantize
from fewfire.adapter import Adapted, open_adapter
from fewfire.checkpoint import Checkpoint, open_checkpoint
from fewfire.config import ModelConfig
from fewfire.errors import CheckpointError, FewfireError
from fewfire.kernels import encode
from fewfire.packed import DESCRIPTION, TEMPLATE, TOKENIZER, WEIGHTS, Formats
from fewfire.progress import Progress, silent
from fewfire.selectors import store, trained

_ROWS = 2048  # encoded at a time


def pack(
    source: Path,
    out: Path,
    weights: str = "q4",
    progress: Progress = silent,
    name: str | None = None,
    adapter: Path | None = None,
) -> Path:
    """Converts the checkpoint at `source` into a packed model at `out`, which must not exist. Returns `out`.

    adapter: a file of what training has changed, which is merged into the weights (`adapter.py`). Raises `ValueError`
    for an unknown format or an existing target, `CheckpointError` for a bad checkpoint or adapter, `FewfireError` when
    the disk does not take it.
    """
    quantize.check_format(weights)
    if out.exists():
        raise ValueError(f"{out} exists already; remove it or choose another name")
    checkpoint = open_checkpoint(source)
    if adapter:
        checkpoint = Adapted(checkpoint, open_adapter(adapter))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        temporary = out.parent / f".{out.name}.{secrets.token_hex(8)}"
        temporary.mkdir()
    except OSError as error:
        raise FewfireError(f"cannot write to {out.parent} ({error.strerror})") from None
    try:
        _write(checkpoint, temporary, weights, progress, name or model_name(source))
        os.replace(temporary, out)
    except OSError as error:
        raise FewfireError(f"cannot write the packed model to {out} ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


_STALE = 3600  # seconds since the last write of a pack that nobody is at work on any more


def _sweep(out: Path) -> None:
    """Removes what packs of this target that were killed have left, and nothing that merely has a similar name."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{16}}")
    for left in [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(OSError):  # another process may remove it meanwhile
            written = max(file.stat().st_mtime for file in (left, *left.glob("*")))
            if left.is_dir() and time.time() - written > _STALE:
                shutil.rmtree(left, ignore_errors=True)


def model_name(source: Path) -> str:
    """What a checkpoint on disk is called: a directory's name, or a file's without its ending."""
    path = Path(os.path.abspath(source))  # "." has no name
    return path.stem if path.is_file() else path.name


def _write(checkpoint: Checkpoint, directory: Path, weights: str, progress: Progress, name: str) -> None:
    config = checkpoint.config
    contents = packed.arrays(config, weights)
    first, offsets = packed.header(contents)
    last = offsets[list(contents)[-1]] + contents[list(contents)[-1]].nbytes
    total, done, digest = last, 0, hashlib.sha256()
    tokenizer, template = checkpoint.tokenizer_json(), checkpoint.chat_template()  # fail before the long part
    sparsity = trained.read(checkpoint.path, config)
    with (directory / WEIGHTS).open("wb") as file:
        file.write(first)
        for array_name, array in contents.items():
            file.seek(offsets[array_name])
            for rows in _rows(checkpoint, config, array_name, weights):
                assert rows.dtype == array.dtype
                file.write(rows.data)  # and not rows.tofile, whose errors do not say what the system said
                digest.update(rows.data)
                done += rows.nbytes
                progress(f"packing {name} as {weights}", done, total)
        _fill(file, last + packed.PAGE - last % packed.PAGE)
    (directory / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    if template is not None:
        (directory / TEMPLATE).write_text(template, encoding="utf-8")
    description = packed.describe(name, weights, config, digest.hexdigest())
    (directory / DESCRIPTION).write_text(description, encoding="utf-8")
    if sparsity:
        written = packed.open_packed(directory)
        store.save(written, sparsity.selection(written), None)
    progress(f"packing {name} as {weights}", total, total)


def _fill(file: BinaryIO, size: int) -> None:
    file.truncate(size)
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:  # some file systems cannot; others say only now that they are full
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def _rows(checkpoint: Checkpoint, config: ModelConfig, name: str, weights: str) -> Iterator[np.ndarray]:
    """The contents of one array of the packed model, in runs of rows."""
    of = packed.formats(config, weights)
    if name in ("embed", "head"):
        for start in range(0, config.vocab_size, _ROWS):
            stop = min(config.vocab_size, start + _ROWS)
            yield _encode(checkpoint.read(f"{name}.weight", start, stop), of.table, "dot", f"{name}.weight")
    elif name == "positions":
        yield checkpoint.read("positions.weight")
    elif name.startswith("final_norm"):
        yield checkpoint.read("final_norm.bias" if name.endswith("bias") else "final_norm.weight")
    else:
        for layer in range(config.num_hidden_layers):
            yield from _layer_rows(checkpoint, config, f"layers.{layer}.", name, of)


def _layer_rows(checkpoint: Checkpoint, config: ModelConfig, at: str, name: str, of: Formats) -> Iterator[np.ndarray]:
    if name == "qkv":
        for part in "qkv":
            yield _encode(checkpoint.read(f"{at}{part}.weight"), of.rows, "dot", f"{at}{part}.weight")
    elif name == "qkv_bias":
        for part in "qkv":
            yield checkpoint.read(f"{at}{part}.bias")
    elif name in ("o", "gate", "bypass"):
        yield _encode(checkpoint.read(f"{at}{name}.weight"), of.matrix(name), "dot", f"{at}{name}.weight")
    elif name == "updown":
        yield from _neurons(checkpoint, config, at, of)
    elif name.endswith("_bias"):
        yield checkpoint.read(f"{at}{name.removesuffix('_bias')}.bias")
    else:
        yield checkpoint.read(f"{at}{name}.weight")


def _neurons(checkpoint: Checkpoint, config: ModelConfig, at: str, of: Formats) -> Iterator[np.ndarray]:
    """Each neuron's up row and down row, next to each other."""
    down = checkpoint.read(f"{at}down.weight")  # (hidden, neurons)
    for start in range(0, config.intermediate_size, _ROWS):
        stop = min(config.intermediate_size, start + _ROWS)
        rows = [_encode(np.ascontiguousarray(down[:, start:stop].T), of.down, "axpy", f"{at}down.weight")]
        if config.gated:
            up = checkpoint.read(f"{at}up.weight", start, stop)
            rows.insert(0, _encode(up, of.rows, "dot", f"{at}up.weight"))
        yield np.concatenate(rows, axis=1)


def _encode(matrix: np.ndarray, weights: str, layout: quantize.Layout, name: str) -> np.ndarray:
    if weights in ("q4", "q8") and np.abs(matrix).max(initial=0.0) > quantize.LARGEST[weights]:
        raise CheckpointError(f"{name}: a weight is too large for {weights}; pack it as bf16 or f32")
    return quantize.encode(matrix, weights, layout, fit_q4)


def fit_q4(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`quantize.fit_q4`, compiled."""
    groups = np.ascontiguousarray(groups)
    integers = np.empty(groups.shape, np.int8)
    scales, minima = np.empty(groups.shape[:2], np.float32), np.empty(groups.shape[:2], np.float32)
    arguments = (groups, quantize.SPANS, integers, scales, minima)
    values, spans, *out = (array.ctypes.data for array in arguments)
    encode.fit_q4(values, groups.size // quantize.GROUP, spans, quantize.SPANS.size, *out)
    return integers, scales.astype(np.float16), minima.astype(np.float16)
