"""The least that an engine needs for its first tokens, for `perf/start.py`: `python -m perf.firsttoken ENGINE ...`.

Loads what has been prepared, reads the ids of a prompt and continues greedily. Says the first token as soon as it is
there, and after the last what memory the process takes. Imports nothing but the engine, and that within its function,
so that the time is the engine's own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

Tokens = Iterator[int]


def fewfire(source: str, form: str, threads: int, ids: list[int]) -> Tokens:
    """This engine, from what `fewfire.load` takes."""
    import fewfire

    session = fewfire.load(source, weights=form, threads=threads).session()
    while True:
        ids = [int(session.feed(ids).argmax())]
        yield ids[0]


def llama_cpp(path: str, form: str, threads: int, ids: list[int]) -> Tokens:
    """llama.cpp's C loop, from a GGUF file of that format."""
    import ctypes

    import llama_cpp
    import numpy as np

    silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 512, threads, threads
    context = llama_cpp.llama_init_from_model(model, params)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    while True:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab,))
        ids = [int(logits.argmax())]
        yield ids[0]


def transformers(path: str, form: str, threads: int, ids: list[int]) -> Tokens:
    """transformers on torch, from a directory in the Hugging Face layout, saved in that type."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    cache = DynamicCache()
    while True:
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), cache=cache, use_cache=True, logits_to_keep=1).logits
        ids = [int(logits[0, -1].argmax())]
        yield ids[0]


def ctranslate2(path: str, form: str, threads: int, ids: list[int]) -> Tokens:
    """CTranslate2, from the directory that its converter made."""
    import ctranslate2

    vocabulary = json.loads((Path(path) / "vocabulary.json").read_text(encoding="utf-8"))
    generator = ctranslate2.Generator(path, device="cpu", compute_type=form, intra_threads=threads)
    for step in generator.generate_tokens([vocabulary[i] for i in ids], max_length=256, min_length=256):
        yield step.token_id


_ENGINES: dict[str, Callable[[str, str, int, list[int]], Tokens]] = {
    "fewfire": fewfire,
    "llama.cpp": llama_cpp,
    "transformers": transformers,
    "ctranslate2": ctranslate2,
}


def memory() -> dict[str, float]:
    """Megabytes resident now (mapped files included), at the peak, and what is not mapped from files; Linux only."""
    names = {"VmRSS:": "resident", "VmHWM:": "peak", "RssAnon:": "anonymous"}
    try:
        fields = [line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {names[f[0]]: round(int(f[1]) * 1024 / 1e6, 1) for f in fields if f and f[0] in names}


def main() -> None:
    """The command: ENGINE PATH FORMAT THREADS TOKENS and the prompt's ids."""
    engine, path, form, *numbers = sys.argv[1:]
    threads, count, *ids = (int(n) for n in numbers)
    said, tokens = 0, _ENGINES[engine](path, form, threads, ids)  # holds the model while memory is read
    for token in islice(tokens, count):
        if not said:
            print(token, flush=True)
        said += 1
    if said < count:
        raise SystemExit(f"{engine} made {said} tokens instead of {count}")
    print(json.dumps(memory()))


if __name__ == "__main__":
    main()
