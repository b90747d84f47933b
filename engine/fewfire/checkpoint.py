"""A checkpoint on disk under canonical tensor names: what packing reads.

`open_checkpoint` takes a directory in the Hugging Face layout or a .gguf file and promises that, when it
returns, every tensor of `config.shapes()` is there, with the right shape, and the files are long enough.
Everything that differs between families is folded in when reading (see `families.py`), so that a reader of a
`Checkpoint` needs no family. Weights are read row by row and never held.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fewfire.config import ModelConfig
from fewfire.errors import CheckpointError
from fewfire.families import Family, canonical_to, read_config, read_thresholds
from fewfire.fields import Fields, unique
from fewfire.tensorfile import Entry, read_header, read_rows, readable

# Tokens that end an answer in the chat formats of the supported families, whatever the configuration says.
END_OF_TURN = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>")


class Checkpoint(Protocol):
    """What every kind of checkpoint offers."""

    config: ModelConfig
    path: Path

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop of a tensor's first axis, float32, C-contiguous and finite."""
        ...

    def tokenizer_json(self) -> str:
        """The contents of a tokenizer.json. Raises `CheckpointError` if there is no tokenizer."""
        ...

    def chat_template(self) -> str | None:
        """The chat template, jinja text."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a directory in the Hugging Face layout or a .gguf file. Raises `CheckpointError`."""
    path = Path(path)
    if path.is_dir():
        return HFCheckpoint(path)
    if path.is_file():
        from fewfire.gguf import GGUFCheckpoint  # the gguf package takes 0.1 s to import

        return GGUFCheckpoint(path)
    raise CheckpointError(f"{path}: no such model directory or .gguf file")


def check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Every tensor of the model must be in `found` (canonical name -> shape) with the right shape."""
    missing = [name for name in config.shapes() if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: tensor {missing[0]}{more} missing: the checkpoint is incomplete")
    for name, shape in config.shapes().items():
        if found[name] != shape:
            raise CheckpointError(f"{where}: tensor {name} has shape {found[name]}, the config asks for {shape}")


def row_range(name: str, rows: int, start: int, stop: int | None) -> tuple[int, int]:
    """Checked bounds of a read. Raises `ValueError`."""
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"rows {start}:{stop} of {name} are not in 0:{rows}")
    return start, stop


def finite(array: np.ndarray, name: str, where: Path) -> np.ndarray:
    """The array itself. Raises `CheckpointError` if it has a NaN or an infinity."""
    if not np.isfinite(array).all():
        raise CheckpointError(f"{where}: tensor {name} has NaN or infinite weights: the checkpoint is damaged")
    return array


_THRESHOLD = ".act_threshold.weight"
_END = 1 << 16  # bytes


def fingerprint(path: Path, adapter: Path | None = None) -> str:
    """Short hex text that changes when a checkpoint's files do, or the adapter that is merged into it.

    Names, sizes, times, and both ends of each file: image builders give all files one time, and two fine-tuned models
    of a kind have the same sizes. The header is at one end; a change in the middle alone changes the time.
    """
    patterns = ("*.safetensors", "*.json", "*.jinja")
    files = [file for pattern in patterns for file in path.glob(pattern)] if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in [*sorted(files), *([adapter] if adapter else [])]:
        stat = file.stat()
        digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_END))
            opened.seek(max(0, stat.st_size - _END))
            digest.update(opened.read(_END))
    return digest.hexdigest()[:16]


def read_json(path: Path) -> tuple[str, dict[str, Any]]:
    """A JSON object, as text and as data. Raises `CheckpointError`."""
    try:
        text = path.read_text("utf-8")
        data = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not valid JSON; fetch the file again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object; fetch the file again")
    return text, data


class HFCheckpoint:
    """A directory with config.json, one or several .safetensors files and a tokenizer.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: no config.json: not a model directory in the Hugging Face layout")
        data, where = read_json(path / "config.json")[1], str(path / "config.json")
        self._family, config = read_config(data, where)
        self._thresholds = read_thresholds(data, config.num_hidden_layers, where)
        entries: dict[str, Entry] = {}
        for file in _weight_files(path):
            entries.update(read_header(file))
        self._entries = {name: _find(self._family, name, entries) for name in config.shapes()}
        wanting = [name for name, entry in self._entries.items() if entry is None and name.endswith(_THRESHOLD)]
        if wanting and not self._thresholds:
            raise Fields(data, where).error("hidden_act_param", "the activation's threshold, or one for each layer")
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(wanting, (config.intermediate_size,))
        shapes |= {name: self._effective_shape(name, e) for name, e in self._entries.items() if e is not None}
        check_shapes(config, shapes, path)
        for name, entry in self._entries.items():
            if entry is not None and not readable(entry):
                raise CheckpointError(
                    f"{entry.path}: tensor {name} is stored as {entry.dtype}; supported: F32, F16, BF16"
                )
        self.config = self._with_tokens(config)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Checkpoint.read`."""
        entry = self._entries[name]
        if entry is None:  # thresholds that are alike
            start, stop = row_range(name, self.config.intermediate_size, start, stop)
            return np.full(stop - start, self._thresholds[int(name.split(".")[1])], np.float32)
        shift = self._position_offset(name)
        start, stop = row_range(name, entry.shape[0] - shift, start, stop)
        rows = finite(read_rows(entry, start + shift, stop + shift), name, entry.path)
        if self._family.norm_offset and name.endswith("norm.weight"):
            rows += np.float32(self._family.norm_offset)
        return rows

    def tokenizer_json(self) -> str:
        """See `Checkpoint.tokenizer_json`."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{self.path}: no tokenizer.json; add the model's, or write one with transformers "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        return read_json(file)[0]

    def chat_template(self) -> str | None:
        """See `Checkpoint.chat_template`. A chat_template.jinja goes before tokenizer_config.json."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            try:
                return file.read_text("utf-8")
            except (OSError, ValueError):
                raise CheckpointError(f"{file}: cannot be read as UTF-8 text") from None
        template = self._optional_json("tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # named templates
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def _position_offset(self, name: str) -> int:
        return self._family.position_offset if name == "positions.weight" else 0

    def _effective_shape(self, name: str, entry: Entry) -> tuple[int, ...]:
        shift = self._position_offset(name)
        return (entry.shape[0] - shift, *entry.shape[1:]) if shift and entry.shape else entry.shape

    def _optional_json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        return read_json(file)[1] if file.is_file() else {}

    def _with_tokens(self, config: ModelConfig) -> ModelConfig:
        """Begin and end tokens: everything that any of the files calls an end of text or of a turn."""
        vocab = config.vocab_size
        generation = Fields(self._optional_json("generation_config.json"), str(self.path / "generation_config.json"))
        tokenizer, settings = (
            self._optional_json("tokenizer.json"),
            self._optional_json("tokenizer_config.json"),
        )
        special = _special_tokens(tokenizer)
        ends = [special[t] for t in (_content(settings.get("eos_token")), *END_OF_TURN) if t in special]
        eos = (*config.eos_token_ids, *generation.ids("eos_token_id", vocab), *(i for i in ends if i < vocab))
        bos = config.bos_token_id
        if bos is None:
            bos = special.get(_content(settings.get("bos_token")))
        add = settings.get("add_bos_token")
        if not isinstance(add, bool):
            add = _begins_with(tokenizer.get("post_processor"), bos)
        return replace(config, bos_token_id=bos, eos_token_ids=unique(eos), add_bos_token=add and bos is not None)


def _weight_files(path: Path) -> list[Path]:
    """The .safetensors files of a directory, as its index names them if it has one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weights = read_json(index)[1].get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(n, str) and Path(n).name == n for n in weights.values()):
            raise CheckpointError(f"{index}: weight_map is missing or damaged; fetch the file again")
        files = sorted({path / name for name in weights.values()})
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise CheckpointError(
                f"{path}: {len(absent)} of {len(files)} shards missing, such as {absent[0]}; fetch again"
            )
        return files
    files = [path / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = f"{len(files)} .safetensors files and no index" if files else "no .safetensors file"
        raise CheckpointError(f"{path}: {found}; the weights must be model.safetensors, or shards with their index")
    return files


def _find(family: Family, name: str, entries: Mapping[str, Entry]) -> Entry | None:
    """A canonical tensor's entry; base models are saved without the "model." that heads put before."""
    stored = canonical_to(family.names, name)
    return entries.get(stored) or entries.get(stored.removeprefix("model."))


def _content(token: Any) -> Any:
    """A token in tokenizer_config.json: a string, or an object with it in "content"."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _special_tokens(tokenizer: Mapping[str, Any]) -> dict[str | None, int]:
    """The special tokens of a tokenizer.json with their ids."""
    added = tokenizer.get("added_tokens")
    return {
        token["content"]: token["id"]
        for token in (added if isinstance(added, list) else [])
        if isinstance(token, dict)
        and token.get("special")
        and isinstance(token.get("content"), str)
        and isinstance(token.get("id"), int)
    }


def _begins_with(processor: Any, bos: int | None) -> bool:
    """Whether a tokenizer.json's post-processor puts the begin token before every text."""
    if not isinstance(processor, dict) or bos is None:
        return False
    if processor.get("type") == "Sequence":
        return any(_begins_with(part, bos) for part in processor.get("processors", []))
    try:
        first = processor["single"][0]["SpecialToken"]["id"]
        return processor["special_tokens"][first]["ids"] == [bos]
    except (KeyError, IndexError, TypeError):
        return False
