"""Models on the Hugging Face hub, through huggingface_hub: its cache, its token, its offline switch.

Promises: what is returned is complete, or a SourceError says in one line what is missing and what to do.
Downloads configuration, tokenizer and safetensors only, or one named .gguf file; never code, never pickles.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewfire.errors import SourceError, one_line
from fewfire.progress import Progress, silent

_WANTED = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "*.safetensors",
    "*.safetensors.index.json",
]
#: Patterns match across slashes: no second copies in subdirectories or in another layout.
_UNWANTED = ["*/*", "consolidated*"]

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<file>.+\.gguf))?", re.ASCII)


def parse(source: str) -> tuple[str, str | None] | None:
    """(repository, file or None) of "owner/name" or "owner/name:file.gguf"; None when it is neither."""
    match = _HUB_ID.fullmatch(source)
    if not match or match["repo"].endswith((".gguf", ".safetensors")):
        return None  # the latter are paths to files, most likely mistyped ones
    return match["repo"], match["file"]


def download(repo: str, file: str | None, progress: Progress | None = None) -> Path:
    """The directory of a repository's snapshot, or the path of one file in it."""
    import huggingface_hub  # half a second that no other source needs
    from huggingface_hub import constants, errors

    progress = progress or silent
    offline = bool(constants.HF_HUB_OFFLINE)
    progress(f"asking for {repo}", 0, 0)
    try:
        with _quiet():
            snapshot = Path(
                huggingface_hub.snapshot_download(
                    repo,
                    allow_patterns=_WANTED if file is None else [glob.escape(file)],
                    ignore_patterns=_UNWANTED if file is None else None,
                    local_files_only=offline,
                    tqdm_class=_bar(repo, progress),
                )
            )
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{repo} is gated: accept its terms on its hub page and log in (hf auth login), or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{repo} is neither a path here nor a repository on the hub that you may read: check the "
            "spelling; a private one needs a login (hf auth login) or HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceError(_unreachable(repo, offline)) from error
    except Exception as error:  # whatever its HTTP library of the day raises
        raise SourceError(
            f"cannot fetch {repo} from the hub: {one_line(error)}; check the network and the free disk space, "
            "or pass a directory or .gguf file on this machine"
        ) from error
    found = snapshot if file is None else snapshot / file
    missing = _missing(found)
    if missing and offline:
        raise SourceError(
            f"the hub's cache has {repo} without {missing}, and HF_HUB_OFFLINE is set: unset it and run again"
        )
    if missing:
        remedy = "check the name" if file else "name one GGUF file as owner/name:file.gguf if it has any"
        raise SourceError(f"{repo} has no {missing}: {remedy}")
    return found


def _unreachable(repo: str, offline: bool) -> str:
    if offline:
        return f"{repo} is not complete in the hub's cache, and HF_HUB_OFFLINE is set: unset it and run again"
    return (
        f"{repo} is neither a path here nor in the hub's cache, and the hub cannot be reached: check the "
        "network, or pass a directory or .gguf file on this machine"
    )


def _missing(found: Path) -> str | None:
    """What a snapshot lacks to be a checkpoint, None when it is whole; of a file, whether it is there."""
    if found.suffix == ".gguf":
        return None if found.is_file() else found.name
    if not (found / "config.json").is_file():
        return "config.json"
    indices = list(found.glob("*.safetensors.index.json"))
    if not indices:
        return None if any(found.glob("*.safetensors")) else "*.safetensors"
    try:
        shards = set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values())
        return next((shard for shard in sorted(shards) if not (found / shard).is_file()), None)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None  # a damaged index is the checkpoint reader's business


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep huggingface_hub from writing to the terminal: what matters comes back as errors and progress."""
    from huggingface_hub import utils

    bars, verbosity = not utils.are_progress_bars_disabled(), utils.logging.get_verbosity()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that HF_HUB_DISABLE_PROGRESS_BARS has the last word
            utils.disable_progress_bars()  # older versions draw one per file, whatever their class
        utils.logging.set_verbosity(logging.ERROR)
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if bars:
            utils.enable_progress_bars()


def _bar(repo: str, progress: Progress) -> Any:
    """A progress bar class for huggingface_hub that draws nothing and calls back."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The bytes as written to disk; there is a second bar for bytes on the wire.
            self._counts = kwargs.get("unit") == "B" and not str(kwargs.get("desc")).startswith("Downloading")
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            drawn = super().update(n)
            self.display()  # the base class skips what comes too fast for the eye, the last bytes with it
            return drawn

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self._counts:
                progress(f"downloading {repo}", int(self.n), int(self.total or 0))

        def close(self) -> None:
            self.disable = True  # so that the base class draws no last line

    return Bar
