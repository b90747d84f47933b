"""One interface to every engine that is measured, and the names they are known by.

A contender is named `ENGINE:FORMAT`, such as `fewfire:q4`, `llama.cpp:Q4_0`, `transformers:bf16` or
`ctranslate2:int8`. All get token ids, and those that can (`Stepwise`) choose the next token with NumPy's argmax over
the logits, so that what differs is the forward pass. Knows nothing of rounds and statistics.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fewfire
from fewfire.cache import cache_dir
from fewfire.checkpoint import fingerprint
from fewfire.sources import resolve
from perf import synthetic


class AbsentError(Exception):
    """A contender that cannot take part here; the message says why."""


@dataclass(frozen=True)
class Request:
    """What to load: a model (see `fewfire.load`), the same as GGUF if the model is none, threads, tokens to hold."""

    source: str
    threads: int
    context: int
    gguf: Path | None = None

    def path(self) -> Path:
        """The model on disk."""
        if synthetic.is_made(self.source):
            raise AbsentError("a model with random weights is there for fewfire and llama.cpp alone")
        return resolve(self.source)

    def loadable(self, weights: str) -> str:
        """What `fewfire.load` takes for a number format."""
        return str(Path(self.source) / weights) if synthetic.is_made(self.source) else self.source

    def label(self) -> str:
        """What results call the model: no path of this machine."""
        return synthetic.label(self.source) if synthetic.is_made(self.source) else Path(self.source).name

    def gguf_path(self) -> Path:
        """The model as a GGUF file. Raises `AbsentError` if there is none."""
        made = sorted(Path(self.source).glob("*.gguf")) if synthetic.is_made(self.source) else []
        path = self.gguf or (made[-1] if made else self.path())
        if path.suffix != ".gguf":
            raise AbsentError(f"{self.source} is not a GGUF file; pass one with --gguf")
        return path


class Contender(ABC):
    """An engine with a loaded model and one conversation."""

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.threads = name, threads
        self.details: dict[str, Any] = {}

    @abstractmethod
    def prefill(self, ids: Sequence[int]) -> float:
        """Reads a prompt from the start and finds the likeliest next token; seconds."""

    @abstractmethod
    def decode(self, count: int) -> float:
        """Continues greedily by so many tokens; seconds."""

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after each token of a text, `(len(ids), vocab)` float32. Forgets what was read before."""

    @abstractmethod
    def bytes_per_token(self, positions: int) -> int:
        """Bytes that must be read for a token after so many positions: weights, keys and values."""


class Stepwise(Contender):
    """An engine that gives its logits away after each step."""

    _next = 0
    _random: np.random.Generator | None = None

    def draw_tokens(self) -> None:
        """From now on goes on with random tokens: what a model with random weights says soon goes round in a circle,
        and then the same few neurons fire all the time."""
        self._random = np.random.default_rng(0)

    def pick(self, logits: np.ndarray) -> int:
        """The next token."""
        best = int(logits.argmax())
        return best if self._random is None else int(self._random.integers(logits.size))

    @abstractmethod
    def reset(self) -> None:
        """Forgets all tokens."""

    @abstractmethod
    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """Reads more tokens; the logits after the last, `(vocab,)` float32, valid until the next call."""

    def prefill(self, ids: Sequence[int]) -> float:
        self.reset()
        start = time.perf_counter()
        self._next = self.pick(self.feed(ids))
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self._next = self.pick(self.feed([self._next]))
        return time.perf_counter() - start

    def greedy(self, ids: Sequence[int], count: int) -> tuple[list[int], float]:
        """The greedy continuation of a prompt, and the least lead of a chosen token's logit over the second best."""
        self.reset()
        tokens: list[int] = []
        logits, lead = self.feed(ids), np.inf
        for _ in range(count):
            second, best = np.partition(logits, -2)[-2:]
            lead = min(lead, float(best - second))
            tokens.append(int(logits.argmax()))
            logits = self.feed(tokens[-1:])
        return tokens, lead


class Fewfire(Stepwise):
    """This engine, through its public API. `q4-dense`: with neurons that a ReLU makes zero."""

    def __init__(self, name: str, form: str, request: Request) -> None:
        super().__init__(name, request.threads)
        weights, dense = form.removesuffix("-dense"), form.endswith("-dense")
        source, threads, context = request.loadable(weights), request.threads, request.context
        self.model = fewfire.load(source, weights=weights, threads=threads, context=context, dense=dense)
        self._session = self.model.session()
        self.details = {"packed_bytes": sum(file.stat().st_size for file in self.model.path.iterdir())}

    def reset(self) -> None:
        self._session.rewind(0)

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        return self._session.feed(ids)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.reset()
        return self._session.feed(ids, all_logits=True)

    def decoded_logits(self, ids: Sequence[int]) -> np.ndarray:
        """The same one token at a time: decoding rounds a little more than reading a prompt."""
        self.reset()
        return np.stack([self._session.feed([token]) for token in ids])

    def bytes_per_token(self, positions: int) -> int:
        c, arrays = self.model.config, self.model.packed.arrays
        tables = {"positions"} if c.tie_word_embeddings else {"positions", "embed"}  # a token reads one row of each
        counted = {"qkv", "o", "gate", "updown", "bypass", "head", "embed"}
        rest = sum(a.nbytes for name, a in arrays.items() if name not in counted | tables)
        return self.model.engine.bytes_read() + rest + self.cached_bytes(positions)

    def cached_bytes(self, positions: float) -> int:
        """The keys and values that a token reads after so many positions."""
        c, item = self.model.config, 4 if self.model.weights in ("f32", "bf16") else 2
        seen = sum(min(positions, c.window(layer) or positions) for layer in range(c.num_hidden_layers))
        return int(seen * 2 * c.num_key_value_heads * c.head_dim * item)

    def neurons_read(self) -> tuple[float, float]:
        """The shares of neurons whose up row the last token read, and whose down row it did."""
        every = self.model.config.num_hidden_layers * self.model.config.intermediate_size
        up, down = self.model.engine.neurons_read()[:, 1:].sum(axis=0) / every
        return float(up), float(down)


def load(name: str, request: Request) -> Contender:
    """The contender of a name. Raises `AbsentError` if it cannot take part, `ValueError` for an unknown name."""
    engine, _, form = name.partition(":")
    if engine == "fewfire":
        return Fewfire(name, form, request)
    if engine == "llama.cpp":
        from perf.llamacpp import LlamaCpp

        return LlamaCpp(name, form, request)
    if engine == "transformers":
        from perf.torchpeers import Transformers

        return Transformers(name, form, request)
    if engine == "ctranslate2":
        from perf.torchpeers import CTranslate2

        return CTranslate2(name, form, request)
    raise ValueError(f"unknown engine {name!r}: use fewfire, llama.cpp, transformers or ctranslate2")


def load_all(names: Sequence[str], requests: Sequence[Request]) -> tuple[list[Contender], dict[str, str]]:
    """Every contender for every request, and why some are absent."""
    contenders: list[Contender] = []
    absent: dict[str, str] = {}
    for name in names:
        for request in requests:
            try:
                contender = load(name, request)
            except AbsentError as error:
                absent[name] = str(error)
                continue
            if isinstance(contender, Stepwise) and synthetic.is_made(request.source):
                contender.draw_tokens()
            contenders.append(contender)
    return contenders, absent


def derived(model: Path, what: str) -> Path:
    """Where a form of a model that a peer needs is kept in the user's cache; changes with the model."""
    directory = cache_dir() / "perf"
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{model.stem}-{fingerprint(model)}-{what}"
