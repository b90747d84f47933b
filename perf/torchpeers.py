"""transformers and CTranslate2 as contenders: what torch reads, and what is converted from that."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fewfire.checkpoint import open_checkpoint
from perf.peers import AbsentError, Contender, Request, Stepwise, derived

os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers imports its progress bars
try:
    import torch
    import transformers
except ImportError as error:
    raise AbsentError("torch and transformers are not installed (pip install '.[bench]')") from error

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Transformers(Stepwise):
    """transformers' own forward pass with its key-value cache."""

    def __init__(self, name: str, form: str, request: Request) -> None:
        super().__init__(name, request.threads)
        if form not in _TYPES:
            raise ValueError(f"transformers is measured as {' or '.join(_TYPES)}, not {form!r}")
        self._model = _read(request.path(), _TYPES[form])
        self._cache = transformers.DynamicCache()

    def reset(self) -> None:
        self._cache = transformers.DynamicCache()

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        return self._forward(ids, 1)[0]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.reset()
        return self._forward(ids, 0)

    def bytes_per_token(self, positions: int) -> int:
        c, model = self._model.config, self._model
        item = model.dtype.itemsize
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        if not c.tie_word_embeddings:
            weights -= c.vocab_size * c.hidden_size * item
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return weights + positions * 2 * c.num_hidden_layers * c.num_key_value_heads * head * item

    def _forward(self, ids: Sequence[int], keep: int) -> np.ndarray:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with torch.inference_mode():
            batch = torch.tensor([list(ids)])
            out = self._model(batch, cache=self._cache, use_cache=True, logits_to_keep=keep)
            return out.logits[0].float().numpy()


class CTranslate2(Contender):
    """CTranslate2's generation loop. Its tokens are not chosen by us, as it keeps its cache to itself."""

    def __init__(self, name: str, form: str, request: Request) -> None:
        super().__init__(name, request.threads)
        try:
            import ctranslate2
        except ImportError as error:
            raise AbsentError("ctranslate2 is not installed (pip install '.[bench]')") from error
        path = converted(request.path(), form)
        self._generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=form, inter_threads=1, intra_threads=request.threads
        )
        self._bytes = (path / "model.bin").stat().st_size
        self._vocabulary = _vocabulary(path)
        self._prompt: list[str] = []
        self.details = {"compute_type": self._generator.compute_type, "file_bytes": self._bytes}

    def prefill(self, ids: Sequence[int]) -> float:
        self._prompt = [self._vocabulary[i] for i in ids]
        start = time.perf_counter()
        self._generate(1)
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        stamps: list[float] = []
        self._generate(count + 1, stamps)  # the first token belongs to the prompt
        return stamps[-1] - stamps[0]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        out = self._generator.forward_batch([list(ids)])
        return np.array(out, dtype=np.float32)[0]

    def bytes_per_token(self, positions: int) -> int:
        return self._bytes  # without keys and values: a few per cent at most

    def _generate(self, count: int, stamps: list[float] | None = None) -> None:
        def stamp(_: Any) -> bool:
            if stamps is not None:
                stamps.append(time.perf_counter())
            return False

        self._generator.generate_batch(
            [self._prompt], max_length=count, min_length=count, include_prompt_in_result=False, callback=stamp
        )
        if stamps is not None and len(stamps) != count:
            raise RuntimeError(f"CTranslate2 made {len(stamps)} tokens instead of {count}")


@cache
def _read(path: Path, dtype: Any) -> Any:
    """A model in the Hugging Face layout or as GGUF, which transformers dequantises itself."""
    gguf = path.suffix == ".gguf"
    where, options = (path.parent, {"gguf_file": path.name}) if gguf else (path, {})
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    except (OSError, ValueError, KeyError) as error:
        raise AbsentError(f"transformers cannot read {path.name}: {str(error).splitlines()[0]}") from error
    return model.eval()


def saved(path: Path, form: str) -> Path:
    """The model in the Hugging Face layout as transformers loads it fastest, kept in the user's cache."""
    return _made(path, f"hf-{form}", lambda target: _plain(path, _TYPES[form]).save_pretrained(target))


def converted(path: Path, form: str) -> Path:
    """The model converted for CTranslate2, kept in the user's cache."""
    from ctranslate2.converters import TransformersConverter

    def convert(target: Path) -> None:
        with TemporaryDirectory(dir=target.parent, prefix=".perf-") as name:
            _plain(path, torch.float32).save_pretrained(name)
            _save_tokenizer(path, Path(name))
            TransformersConverter(name).convert(str(target), quantization=form)

    return _made(path, f"ct2-{form}", convert)


def _made(path: Path, what: str, make: Callable[[Path], object]) -> Path:
    """A directory in the user's cache that is made once, and never half."""
    target = derived(path, what)
    if target.is_dir():
        return target
    work = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        make(work)
        os.replace(work, target)
    except (ValueError, RuntimeError) as error:
        raise AbsentError(f"{path.name} cannot be made {what}: {str(error).splitlines()[0]}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _plain(path: Path, dtype: Any) -> Any:
    """The model without the mark of a GGUF's quantisation: its weights are plain floats by now."""
    model = _read(path, dtype)
    if hasattr(model.config, "quantization_config"):
        model.hf_quantizer = None
        del model.config.quantization_config
    return model


def _save_tokenizer(path: Path, target: Path) -> None:
    """CTranslate2 wants to know tokens by their text, and one for each role."""
    checkpoint = open_checkpoint(path)
    file = target / "tokenizer.json"
    file.write_text(checkpoint.tokenizer_json(), encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    first = checkpoint.config.bos_token_id or 0
    last = checkpoint.config.eos_token_ids[0] if checkpoint.config.eos_token_ids else first
    begin, end = (str(tokenizer.convert_ids_to_tokens(token)) for token in (first, last))
    tokenizer.add_special_tokens({"bos_token": begin, "eos_token": end, "unk_token": begin})
    tokenizer.save_pretrained(target)


def _vocabulary(path: Path) -> list[str]:
    vocabulary: list[str] = json.loads((path / "vocabulary.json").read_text(encoding="utf-8"))
    return vocabulary
