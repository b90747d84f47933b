"""llama.cpp as a contender, through the low-level API of llama-cpp-python: its C loop, none of its Python sampler.

A format is `original` (the GGUF as it is) or a type that llama.cpp itself requantises the same GGUF to. Results say
which tensor types the file really has, and how llama.cpp laid them out in memory.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from perf.peers import AbsentError, Request, Stepwise, derived

try:
    import llama_cpp
except ImportError as error:
    raise AbsentError("llama-cpp-python is not installed (pip install '.[bench]')") from error

_BATCH = 2048  # tokens of one llama_decode; llama.cpp's default
_said: list[str] = []


@llama_cpp.llama_log_callback
def _listen(level: int, text: bytes, user_data: object) -> None:
    _said.append(text.decode("utf-8", "replace"))


class LlamaCpp(Stepwise):
    """A context of its own on a model that contenders of the same file share."""

    def __init__(self, name: str, form: str, request: Request) -> None:
        super().__init__(name, request.threads)
        path = requantized(request.gguf_path(), form)
        self._model, buffers = _open(path)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = request.context
        params.n_batch = min(request.context, _BATCH)
        params.n_threads = params.n_threads_batch = request.threads
        params.no_perf = True
        if form == "F32":  # as exact as llama.cpp gets: float32 keys and values; flash attention would round to float16
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise AbsentError(f"llama.cpp could not open {path.name}: {''.join(_said[-5:]).strip()}")
        self._batch = params.n_batch
        types, self._weights, self._cell = _tensors(path)
        features = llama_cpp.llama_print_system_info().decode()
        self.details = {"tensors": types, "buffers": buffers, "file_bytes": path.stat().st_size, "built_with": features}

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        for start in range(0, len(ids), self._batch):
            part = ids[start : start + self._batch]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            self._decode(llama_cpp.llama_batch_get_one(tokens, len(part)))
        last = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(last, (self.vocab,))

    def use(self, threads: int) -> None:
        """Computes with so many threads from now on."""
        llama_cpp.llama_set_n_threads(self._context, threads, threads)

    def remembered(self) -> Any:
        """What was read so far, keys and values, to go on from there with `recall`."""
        state = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(self._context, 0))()
        llama_cpp.llama_state_seq_get_data(self._context, state, len(state), 0)
        return state

    def recall(self, state: Any, count: int) -> None:
        """The first `count` tokens of what was remembered."""
        self.reset()
        if not llama_cpp.llama_state_seq_set_data(self._context, state, len(state), 0):
            raise RuntimeError("llama.cpp could not restore its keys and values")
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, count, -1)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.reset()
        out = np.empty((len(ids), self.vocab), np.float32)
        batch = llama_cpp.llama_batch_init(self._batch, 0, 1)
        try:
            for start in range(0, len(ids), self._batch):
                part = ids[start : start + self._batch]
                for i, token in enumerate(part):
                    batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.n_tokens = len(part)
                self._decode(batch)
                address = llama_cpp.llama_get_logits(self._context)
                out[start : start + len(part)] = np.ctypeslib.as_array(address, (len(part), self.vocab))
        finally:
            llama_cpp.llama_batch_free(batch)
        return out

    def bytes_per_token(self, positions: int) -> int:
        return self._weights + positions * self._cell

    def _decode(self, batch: Any) -> None:
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with code {code}")


def requantized(model: Path, form: str) -> Path:
    """A GGUF requantised by llama.cpp, kept in the user's cache; the file itself if `form` is "original"."""
    if form == "original":
        return model
    ftype = llama_cpp.LLAMA_FTYPE_ALL_F32 if form == "F32" else getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}", None)
    if ftype is None:
        raise ValueError(f"llama.cpp has no format {form!r}: use original, F32, Q8_0, Q4_0, Q4_1, Q4_K_M, ...")
    path = derived(model, f"{form}.gguf")
    if path.exists():
        return path
    _start()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = ftype, True
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        if llama_cpp.llama_model_quantize(os.fsencode(model), os.fsencode(temporary), ctypes.byref(params)):
            raise AbsentError(f"llama.cpp could not requantise {model.name}: {''.join(_said[-5:]).strip()}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@cache
def _start() -> None:
    llama_cpp.llama_log_set(_listen, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


@cache
def _open(path: Path) -> tuple[Any, list[str]]:
    """The model, and llama.cpp's words on where it put the weights (repacked ones are in a buffer of their own)."""
    _start()
    before = len(_said)
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
    if not model:
        raise AbsentError(f"llama.cpp could not load {path.name}: {''.join(_said[-5:]).strip()}")
    lines = "".join(_said[before:]).splitlines()
    return model, [" ".join(line.split(":", 1)[1].split()) for line in lines if "model buffer size" in line]


@cache
def _tensors(path: Path) -> tuple[dict[str, int], int, int]:
    """Number of tensors of each type, bytes of weights that a token reads, bytes that each position adds (float16)."""
    import gguf

    reader = gguf.GGUFReader(path)
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    names = {tensor.name for tensor in reader.tensors}
    once = {"token_embd.weight"} if "output.weight" in names else set()  # one row of it per token
    weights = sum(int(tensor.n_bytes) for tensor in reader.tensors if tensor.name not in once)
    cell = sum(
        2 * int(tensor.shape[1])  # output features, which are keys or values
        for tensor in reader.tensors
        if tensor.name.endswith((".attn_k.weight", ".attn_v.weight"))
    )
    return dict(types.most_common()), weights, cell
