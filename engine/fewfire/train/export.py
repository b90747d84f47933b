"""What training leaves: a checkpoint in the Hugging Face layout, and the update by itself as a small adapter.

The checkpoint has config.json, model.safetensors (matrices in float16, vectors in float32), the tokenizer, a model card
(`card.py`), and sparsity.json where the method has a selection of its own; `pack` and everything else open it like any
other. Every file is written under another name and renamed, config.json last, without which a directory is no model.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from fewfire import adapter
from fewfire.checkpoint import Checkpoint
from fewfire.config import ModelConfig
from fewfire.errors import CheckpointError, FewfireError
from fewfire.families import FAMILIES, Family, canonical_to
from fewfire.selectors.trained import NAME, TENSORS
from fewfire.train.card import NAME as CARD
from fewfire.train.hfconfig import hf_config, with_biases
from fewfire.train.lora import PROJECTIONS, LowRank, merge
from fewfire.train.method import Result
from fewfire.train.network import Network, of_activations

ADAPTER = "adapter.safetensors"
_COPIED = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


def new_config(network: Network, result: Result) -> ModelConfig:
    """The configuration of the trained model."""
    return with_biases(replace(network.config, **result.config))


def tensors(network: Network, config: ModelConfig, result: Result) -> dict[str, np.ndarray]:
    """The weights that a configuration asks for, by canonical name, float32; low-rank updates must have been merged.

    Biases that the network does not have are zero.
    """
    zeros = {name: torch.zeros(shape) for name, shape in config.shapes().items() if name.endswith(".bias")}
    state = {name: value for name, value in network.state_dict().items() if ".activation." not in name}
    state = {**zeros, **state, **of_activations(network), **result.vectors}
    return {name: _array(state[name]) for name in config.shapes()}


def check(network: Network, checkpoint: Checkpoint, result: Result, with_adapter: bool) -> None:
    """Raises `CheckpointError` if nothing of a training could be written: to be asked before it begins.

    A model that no config.json can describe leaves only an adapter, if one is wanted and can hold the result.
    """
    if not with_adapter or result.sparsity is not None:
        hf_config(checkpoint, new_config(network, result))


def write(
    network: Network,
    checkpoint: Checkpoint,
    result: Result,
    out: Path,
    card: str | None = None,
    *,
    with_adapter: bool = False,
) -> None:
    """Writes the trained model into `out`, with its card; merges the network's low-rank updates.

    with_adapter: whether the update has been written as an adapter, which is enough where no config.json can describe
    the model: then nothing is written. Raises `FewfireError`.
    """
    merge(network)
    config = new_config(network, result)
    family = FAMILIES[config.architecture]
    try:
        data = hf_config(checkpoint, config)
    except CheckpointError:
        if with_adapter:
            return
        raise
    stored = {canonical_to(family.names, k): _stored(family, k, v) for k, v in tensors(network, config, result).items()}
    temporary = out / f".writing-{secrets.token_hex(8)}"
    try:
        temporary.mkdir(parents=True)
        save_file(stored, temporary / "model.safetensors", metadata={"format": "pt"})
        if result.sparsity is not None:
            (temporary / NAME).write_text(json.dumps(result.sparsity) + "\n", encoding="utf-8")
        if result.tensors:
            save_file({name: _array(value) for name, value in result.tensors.items()}, temporary / TENSORS)
        _tokenizer(checkpoint, temporary)
        if card is not None:
            (temporary / CARD).write_text(card, encoding="utf-8")
        (temporary / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)
    except OSError as error:
        raise FewfireError(f"cannot write the trained model to {out} ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenizer(checkpoint: Checkpoint, out: Path) -> None:
    (out / "tokenizer.json").write_text(checkpoint.tokenizer_json(), encoding="utf-8")
    if (template := checkpoint.chat_template()) is not None:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in _COPIED:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, out / name)
    if not (out / "tokenizer_config.json").exists():
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": checkpoint.config.add_bos_token}
        (out / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


def _stored(family: Family, name: str, value: np.ndarray) -> np.ndarray:
    """A tensor as the family's checkpoints have it."""
    if family.norm_offset and name.endswith("norm.weight"):
        value = value - np.float32(family.norm_offset)
    if family.position_offset and name == "positions.weight":
        value = np.concatenate([np.zeros((family.position_offset, value.shape[1]), value.dtype), value])
    fits = value.ndim > 1 and np.abs(value).max(initial=0.0) < np.finfo(np.float16).max
    return np.ascontiguousarray(value, np.float16 if fits else np.float32)


def write_adapter(
    network: Network,
    checkpoint: Checkpoint,
    result: Result,
    path: Path,
    *,
    base: str,
    method: str,
    about: Mapping[str, Any],
) -> None:
    """Writes the update as an adapter for the original checkpoint, before the network's updates are merged.

    Low-rank updates are written as they are, full ones in few bits, which loses something. Raises `ValueError` for a
    method whose selection is no part of a model's weights: no adapter can have it.
    """
    if result.sparsity is not None:
        raise ValueError(f"an adapter cannot hold what {method} chooses neurons with: use the trained model itself")
    found = dict(result.vectors)
    for number, layer in enumerate(network.layers):
        at = f"layers.{number}."
        for name in PROJECTIONS:
            part = getattr(layer, name)
            if part is None:
                continue
            if isinstance(part, LowRank):
                found[f"{at}{name}.A"], found[f"{at}{name}.B"] = part.A, part.B
                continue
            original = torch.from_numpy(checkpoint.read(f"{at}{name}.weight")).to(part.weight.device)
            if not torch.equal(part.weight, original):
                found[f"{at}{name}{adapter.DELTA}"] = part.weight.detach() - original
        for name, value in layer.named_parameters():
            if value.requires_grad and value.ndim == 1:
                found[at + name] = value
    config = new_config(network, result)
    changes = {k: getattr(config, k) for k in adapter.CHANGES if getattr(config, k) != getattr(checkpoint.config, k)}
    arrays = {name: _array(value) for name, value in found.items()}
    adapter.save(path, checkpoint, arrays, base=base, method=method, config=changes, about=about)


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
