"""A calibration on disk, next to the packed model that it is for: `selectors.json` and a file of tensors that it names.

Promises: a reader sees the old calibration or the new one and never a mixture, because the tensors have a name of their
own in every calibration and the description, which is replaced last, decides; a write that is killed leaves the old one
valid. What was made for another model, number format or version is refused, and so is what is damaged, before the
engine sees an array: numbers whole, stored rows by samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fewfire import memory, tensorfile
from fewfire.errors import CheckpointError, FewfireError
from fewfire.packed import DESCRIPTION, WEIGHTS, Packed
from fewfire.selectors.parts import flatten, misfit, unflatten
from fewfire.selectors.selection import Selection

VERSION = 4  # of the files, and of what the kernels make of them
NAME = "selectors.json"
_TENSORS = "selectors-{}.safetensors"
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}
_OURS = re.compile(r"selectors-[0-9a-f]{16}\.safetensors")
_STALE = 3600  # seconds since the last write of a file that nobody is at work on any more
_SLACK = 4096  # kernels may read a few bytes past a row
_SAMPLES = 8  # places of a large array that its digest looks at, and their size in bytes
_PLACE = 256


@dataclass(frozen=True)
class About:
    """What a calibration was made of and what it measured, on text that it was not fitted to."""

    method: str  # as it was asked for or found: "gate+magnitude"
    density: float  # share of the bytes of the rows that the method may leave out, read for a token
    densities: dict[str, list[float]]  # share kept by each part of the method, layer by layer; the head is one layer
    settings: dict[str, Any]  # what was asked for: {"density": 0.5} or {"budget": 0.01}
    sample: str  # the text that it was fitted to
    tokens: int  # that the three figures were measured on
    growth: float  # of perplexity against dense: 0.01 is 1 %
    growth_error: float  # standard error of that
    kl: float  # mean KL divergence of the next-token distribution from the dense one, in nats
    agreement: float  # share of tokens where both have the same most probable next one
    bytes_per_token: int  # of weights
    dense_bytes_per_token: int
    speedup: float  # dense time of a decoded token / its time, on the machine that calibrated
    missed: float | None = None  # upper bound (95 %) on the share of tokens whose likeliest next one the head misses
    tried: list[dict[str, Any]] = field(default_factory=list)  # other methods' figures, if several were tried


def save(packed: Packed, selection: Selection, about: About | None) -> Path:
    """Writes a calibration into the packed model's directory, in place of the one there. Returns its description.

    about: None for a selection that the model was trained with, of which nothing was measured here.
    Raises `ValueError` for a selection that does not fit the model, `FewfireError` when the disk does not take it;
    what was there before stays then.
    """
    arrays, numbers = flatten(selection)
    if wrong := misfit(packed, arrays, numbers):
        raise ValueError(f"the selection does not fit the model: {wrong}")
    tensors = _TENSORS.format(secrets.token_hex(8))
    content = {
        "version": VERSION,
        "engine": _engine(),
        "model": model_digest(packed),
        "weights": packed.weights,
        "about": dataclasses.asdict(about) if about else None,
        "numbers": numbers,
        "tensors": tensors,
        "contents": _digest(arrays),
    }
    text = json.dumps({**content, "digest": _text_digest(content)}, indent=1) + "\n"
    temporary, before = packed.path / f".{tensors}.json", _named(packed)
    try:
        save_file({**arrays, "~": np.zeros(_SLACK, np.uint8)}, packed.path / tensors)
        _flush(packed.path / tensors)
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, packed.path / NAME)
    except BaseException as error:
        if _named(packed) != tensors:  # else it came, say Ctrl-C, when all was done
            _remove(temporary, packed.path / tensors)
        if isinstance(error, (OSError, SafetensorError)):
            raise _unwritable(packed.path, error) from None
        raise
    _sweep(packed.path, before, tensors)
    return packed.path / NAME


def check_writable(packed: Packed) -> None:
    """Raises `FewfireError` if nothing can be written next to the packed model: better before a long calibration."""
    probe = packed.path / f".{_TENSORS.format(secrets.token_hex(8))}.json"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(packed.path, error) from None


def load(packed: Packed, threads: int = 0) -> Selection | None:
    """The calibration in a packed model's directory, None without one. Raises `CheckpointError` if it is of no use.

    threads: as for `packed.open_packed`.
    """
    content = _description(packed)
    if content is None:
        return None
    tensors = packed.path / content["tensors"]
    if not tensors.exists() and _named(packed) not in ("", tensors.name):
        return load(packed, threads)  # another process has replaced it just now
    try:
        arrays = _arrays(tensors, threads)
    except FileNotFoundError:
        raise _damaged(packed, f"{tensors.name} is missing") from None
    except (CheckpointError, OSError, ValueError, KeyError):
        raise _damaged(packed, f"{tensors.name} is damaged or truncated") from None
    wrong = misfit(packed, arrays, content["numbers"])
    if wrong or _digest(arrays) != content["contents"]:
        raise _damaged(packed, wrong or f"{tensors.name} is damaged")
    return unflatten(arrays, content["numbers"])


def about(packed: Packed) -> About | None:
    """What the calibration of a packed model says about itself, None if there is none. Raises like `load`."""
    content = _description(packed)
    try:
        return None if content is None or content["about"] is None else About(**content["about"])
    except TypeError:
        raise _damaged(packed, f"{NAME} is damaged") from None


def disk_bytes(packed: Packed) -> int:
    """What a packed model's calibration takes on the disk, in whatever state it is; 0 if there is none."""
    found = 0
    for name in (NAME, _named(packed)):
        with contextlib.suppress(OSError):
            found += (packed.path / name).stat().st_size if name else 0
    return found


def remove(packed: Packed) -> int:
    """Removes a packed model's calibration, in whatever state it is; returns the bytes that it took, 0 without one.

    Raises `FewfireError` if the disk does not let it go.
    """
    freed, tensors = disk_bytes(packed), _named(packed)
    try:
        (packed.path / NAME).unlink(missing_ok=True)
    except OSError as error:
        raise FewfireError(f"cannot remove {packed.path / NAME} ({error.strerror}); see who may write there") from None
    _sweep(packed.path, tensors, "")
    return freed


def is_trained(packed: Packed) -> bool:
    """Whether the packed model has a selection that it was trained with, be that damaged or not."""
    try:
        return bool(json.loads((packed.path / NAME).read_text(encoding="utf-8"))["numbers"]["trained"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def model_digest(packed: Packed) -> str:
    """Tells packed models apart: by their description, which has a digest of all weights, and to see that these are
    still the weights that it describes, by their size and samples of every array."""
    found = hashlib.sha256((packed.path / DESCRIPTION).read_bytes())
    found.update(str((packed.path / WEIGHTS).stat().st_size).encode())
    found.update(_digest(packed.arrays, whole=False).encode())
    return found.hexdigest()[:16]


def _engine() -> str:
    """The version of the engine as far as it matters: fixes do not change what a threshold means."""
    from fewfire import __version__  # not yet defined when this module is imported

    return ".".join(__version__.split(".")[:2])


def _description(packed: Packed) -> dict[str, Any] | None:
    """What `selectors.json` says, after everything in it that refuses has been asked."""
    try:
        content = json.loads((packed.path / NAME).read_text(encoding="utf-8"))
        versions, model = (content["version"], content["engine"]), content["model"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(packed, f"cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(packed, f"{NAME} is damaged") from None
    if versions != (VERSION, _engine()):
        raise _damaged(packed, "it was made by another version of fewfire")
    if content.get("weights") != packed.weights:
        raise _damaged(packed, f"it was made for {content.get('weights')} weights and these are {packed.weights}")
    if model != model_digest(packed):
        raise _damaged(packed, "it was made for another model")
    if content.pop("digest", None) != _text_digest(content) or not _OURS.fullmatch(content["tensors"]):
        raise _damaged(packed, f"{NAME} is damaged")
    return content


def _damaged(packed: Packed, why: str) -> CheckpointError:
    if is_trained(packed):
        return CheckpointError(f"{packed.path}: what the model was trained with cannot be used: {why}; pack it again")
    return CheckpointError(
        f"{packed.path}: the calibration cannot be used: {why}; run `fewfire calibrate` on this model again, "
        f"pass --dense (dense=True), or delete {packed.path / NAME}"
    )


def _unwritable(path: Path, error: BaseException) -> FewfireError:
    why = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:200]
    return FewfireError(
        f"cannot write the calibration to {path} ({why}); make room, or copy the packed model to where you may write"
    )


def _digest(arrays: Mapping[str, np.ndarray], whole: bool = True) -> str:
    """Of names, shapes and contents; of stored rows (or of everything if not `whole`) a few places of each array."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        found.update(f"{name} {array.dtype} {array.shape} ".encode())
        data = array.reshape(-1).view(np.uint8)
        if whole and array.dtype != np.uint8:
            found.update(data.data)
        else:
            for start in np.linspace(0, max(0, len(data) - _PLACE), _SAMPLES).astype(int):
                found.update(data[start : start + _PLACE].data)
    return found.hexdigest()[:16]


def _text_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _arrays(path: Path, threads: int) -> dict[str, np.ndarray]:
    """Read-only views of a file of tensors. Raises `FileNotFoundError` and what says that it is damaged."""
    with path.open("rb") as file:
        data = memory.contents(file, threads)
    found = {
        name: np.frombuffer(data.data, _TYPES[e.dtype], math.prod(e.shape), e.offset).reshape(e.shape)
        for name, e in tensorfile.read_header(path).items()
    }
    del found["~"]
    return found


def _flush(path: Path) -> None:
    """Asks the system to put a file on the disk before another one refers to it."""
    with path.open("r+b") as file, contextlib.suppress(OSError):  # some file systems cannot
        os.fsync(file.fileno())


def _named(packed: Packed) -> str:
    """The file of tensors that the description names, without believing anything else in it."""
    try:
        name = json.loads((packed.path / NAME).read_text(encoding="utf-8"))["tensors"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return name if isinstance(name, str) and _OURS.fullmatch(name) else ""


def _sweep(directory: Path, before: str, keep: str) -> None:
    """Removes the calibration that was replaced, and what killed ones have left, but nothing that is being written."""
    if before:
        _remove(directory / before)
    for path in directory.iterdir():
        name = path.name.removeprefix(".").removesuffix(".json")
        with contextlib.suppress(OSError):
            if _OURS.fullmatch(name) and name != keep and time.time() - path.stat().st_mtime > _STALE:
                _remove(path)


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # on some systems not while another process has it mapped
            path.unlink()
