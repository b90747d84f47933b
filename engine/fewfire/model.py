"""The public face of the engine: `load` a model, then generate, stream, chat, or look at logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fewfire import generate, memory, quantize
from fewfire.chat import ChatTemplate, Message
from fewfire.checkpoint import fingerprint
from fewfire.engine import Engine
from fewfire.errors import CheckpointError, FewfireError
from fewfire.generate import Completion, Stream
from fewfire.library import packed_dir
from fewfire.pack import model_name, pack
from fewfire.packed import TEMPLATE, TOKENIZER, VERSION, Packed, is_packed, open_packed
from fewfire.progress import Progress, silent
from fewfire.sampling import Sampling
from fewfire.selectors import store
from fewfire.session import Session
from fewfire.sources import adapter_of, resolve
from fewfire.team import default_threads
from fewfire.tokenizer import Tokenizer


def load(
    source: str | Path = "smollm2",
    *,
    weights: str = "q4",
    threads: int | None = None,
    context: int | None = None,
    dense: bool = False,
    progress: Progress = silent,
) -> Model:
    """Opens a model for generation.

    source: an alias ("smollm2"), a directory in the Hugging Face layout, a hub id, a .gguf file, or a packed model
    directory. Anything but a packed model is packed once, as `weights` ("q4", "q8", "bf16", "f32"), into the user's
    cache; a packed model keeps its format. threads: that read and run it; default, all cores of the process. context:
    the most tokens that a session may hold; default, the model's limit. dense: leave nothing out: do not use the
    model's calibration, nor skip neurons that a ReLU makes zero. progress: called with (stage, done, total) while
    fetching, packing and compiling.

    Raises `ValueError` for an impossible option, `SourceError` if the model cannot be found or fetched,
    `CheckpointError` if it is damaged or unsupported.
    """
    quantize.check_format(weights)
    if threads is not None and not 1 <= threads <= 256:
        raise ValueError(f"threads must be from 1 to 256, not {threads}")
    if context is not None and context < 1:
        raise ValueError(f"context must be at least 1 token, not {context}")
    threads = threads or default_threads()
    return Model(_packed(source, weights, threads, progress), threads, context, progress, dense)


def _packed(source: str | Path, weights: str, threads: int, progress: Progress) -> Packed:
    """The packed model of a source, from the cache if it has been packed before."""
    path = resolve(source, progress)
    if is_packed(path):
        return open_packed(path, threads, progress)
    name = model_name(path) if Path(source).expanduser().exists() else str(source).replace("/", "--").replace(":", "--")
    adapter = adapter_of(source)
    cached = packed_dir() / f"{name}-{weights}-{fingerprint(path, adapter)}-v{VERSION}"
    if not is_packed(cached):
        try:
            pack(path, cached, weights, progress, name, adapter)
        except (ValueError, FewfireError):  # another process may have been faster
            if not is_packed(cached):
                raise
    return open_packed(cached, threads, progress)


class Model:
    """A loaded model. Safe to use from several threads: forward passes take turns, sessions are independent."""

    def __init__(
        self,
        packed: Packed,
        threads: int,
        context: int | None = None,
        progress: Progress = silent,
        dense: bool = False,
    ) -> None:
        self.path, self.weights, self.config = packed.path, packed.weights, packed.config
        self.packed = packed
        self.context = min(context or packed.config.max_position_embeddings, packed.config.max_position_embeddings)
        self.tokenizer = _tokenizer(packed)
        self.chat_template = _template(packed, self.tokenizer)
        self.engine = Engine(packed, threads, progress, dense, None if dense else store.load(packed, threads))
        memory.trim()

    @property
    def threads(self) -> int:
        """Threads that a forward pass runs on."""
        return self.engine.threads

    def session(self) -> Session:
        """A new, empty conversation."""
        return Session(self)

    def logits(self, prompt: str | Sequence[int]) -> np.ndarray:
        """The next-token logits after each token of a prompt, `(tokens, vocab)` float32, with all weights."""
        return self.session().feed(generate.prompt_ids(self, prompt), all_logits=True, prompt=True)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
    ) -> Completion:
        """Continues a prompt (text or token ids) and returns the whole answer: `stream`, read to its end."""
        return self.stream(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, session=session).read()

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
    ) -> Stream:
        """Continues a prompt piece by piece. See `generate.stream`."""
        return generate.stream(self, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, session=session)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 1024,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
    ) -> Completion:
        """Answers a conversation of `{"role": ..., "content": ...}` messages."""
        return self.chat_stream(messages, max_tokens=max_tokens, sampling=sampling, stop=stop, session=session).read()

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 1024,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
    ) -> Stream:
        """Answers a conversation piece by piece. Pass the same session again and only what is new is read."""
        return generate.chat_stream(
            self, messages, max_tokens=max_tokens, sampling=sampling, stop=stop, session=session
        )


def _tokenizer(packed: Packed) -> Tokenizer:
    path = packed.path / TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"{packed.path}: {TOKENIZER} is missing; pack the model again")
    return Tokenizer.from_file(path)


def _template(packed: Packed, tokenizer: Tokenizer) -> ChatTemplate | None:
    path = packed.path / TEMPLATE
    if not path.is_file():
        return None
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: the chat template cannot be read as UTF-8 text; pack the model again") from None

    def text(token_id: int | None) -> str:
        return (tokenizer.id_to_token(token_id) or "") if token_id is not None else ""

    eos = packed.config.eos_token_ids
    return ChatTemplate(template, text(packed.config.bos_token_id), text(eos[0] if eos else None))
