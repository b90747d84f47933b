"""A training run from a user's words to a finished directory: opens the model, builds the corpus, trains, exports."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fewfire.adapter import Adapted, Adapter, open_adapter
from fewfire.cache import cache_dir
from fewfire.checkpoint import Checkpoint, fingerprint, open_checkpoint
from fewfire.fields import Fields
from fewfire.progress import Progress, silent
from fewfire.sources import adapter_of, resolve
from fewfire.tokenizer import Tokenizer
from fewfire.train import card, export, log, lora
from fewfire.train import corpus as text
from fewfire.train.corpus import Corpus
from fewfire.train.layerwise import Layerwise
from fewfire.train.lte import Lte
from fewfire.train.method import Method
from fewfire.train.network import Network
from fewfire.train.reconstruct import reconstruct
from fewfire.train.relufy import Kind, Relufy, shift, usual
from fewfire.train.rise import Rise
from fewfire.train.teacher import TeacherCache
from fewfire.train.topk import TopKMethod
from fewfire.train.trainer import STATE, Plan, Trainer

TOP = 64  # logits of the teacher that are kept for a token
SPARSITY = 0.8  # unless another is wanted
HELD_OUT = 16  # windows that are measured
TRAINING = "training"  # the directory of a run's log and state, in that of its result
AT_ONCE = 1024  # tokens of a forward pass


@dataclass(frozen=True)
class Options:
    """What a user may choose. Not every method reads all of it."""

    tokens: int = 1_000_000
    sparsity: float | None = None  # None: 0.8, or what ReLU has by itself
    rank: int = 0  # of the updates; 0: all weights of the projections move
    down: bool = False  # whether of the projections only down moves, besides biases, which a model gets for it
    reconstruct: bool = False  # whether down starts as what makes up best for what is left out
    start: str = ""  # an adapter that an earlier training has left, whose result is where this one begins
    adapter: bool = False  # whether a full update is written as an adapter besides
    rate: float | None = None  # None: 1e-4, or 1e-3 for low-rank updates
    window: int = 512
    batch: int = 2  # windows of a step
    bf16: bool = False  # matrix products in bfloat16
    labels: float = 0.0  # share of the text's own next tokens in the loss
    layerwise: float = 0.0  # weight of the layers' relative errors
    seed: int = 0
    activation: Kind | None = None  # of relufy; None: the nearest to the original that the model can have
    stage: int = 1
    shift: float = 1.0
    l1: float = 0.0
    uniform: bool = False  # the same sparsity in all layers
    efficiency: float = 0.3  # weights of LTE's losses
    separability: float = 0.001

    def check(self) -> None:
        """Raises `ValueError` for what no method can do."""
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"--sparsity must be between 0 and 1, not {self.sparsity:g}")
        for name, least in (("tokens", 1), ("window", 2), ("batch", 1), ("rank", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if self.reconstruct and self.rank:
            raise ValueError("--reconstruct changes all weights of down: leave --rank out")
        if self.reconstruct and self.activation in ("relu", "shifted") and self.sparsity is not None:
            raise ValueError("--reconstruct makes up for ReLU's own zeros, not for those of a --sparsity at the end")
        if self.adapter and self.rank:
            raise ValueError("--rank leaves an adapter anyway: leave --adapter out")
        if self.start and self.rank:
            raise ValueError("--start goes on with all weights: leave --rank out")
        if not 0 <= self.labels <= 1:
            raise ValueError(f"--labels must be from 0 to 1, not {self.labels:g}")
        for name in ("layerwise", "l1", "efficiency", "separability"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} must be 0 or more, not {getattr(self, name)}")

    def chosen(self) -> dict[str, Any]:
        """What is not the default, by its name; of a file the name alone."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return found | ({"start": Path(self.start).name} if self.start else {})


@dataclass(frozen=True, eq=False)
class Setup:
    """What a recipe has to work with."""

    network: Network
    corpus: Corpus
    options: Options
    steps: int

    @property
    def rise(self) -> Rise:
        """The sparsity by step: the wanted one from the beginning if the weights have been made for it."""
        end = self.options.sparsity or SPARSITY
        made = self.options.reconstruct or self.options.start
        return Rise(end, self.steps, end) if made else Rise(end, self.steps)


def relufy(setup: Setup) -> Method:
    """See `relufy.py`."""
    o = setup.options
    assert o.activation is not None  # `train` has chosen one
    if o.activation == "shifted" and not o.start:
        shift(setup.network, o.shift)
    return Relufy(
        setup.network,
        setup.corpus.windows,
        setup.rise if o.activation not in ("relu", "shifted") or o.sparsity else None,
        setup.steps,
        kind=o.activation,
        stage=o.stage,
        regularization=o.l1,
        uniform=o.uniform,
    )


def topk(setup: Setup) -> Method:
    """See `topk.py`."""
    return TopKMethod(setup.network, setup.rise)


def lte(setup: Setup) -> Method:
    """See `lte.py`."""
    o = setup.options
    density = 1 - (SPARSITY if o.sparsity is None else o.sparsity)
    return Lte(setup.network, setup.corpus.windows, setup.steps, density=density,
               efficiency=o.efficiency, separability=o.separability)  # fmt: skip


def plain(setup: Setup) -> Method:
    """Nothing but the training itself: what the others are to be compared with."""
    return Method()


RECIPES: dict[str, Callable[[Setup], Method]] = {"relufy": relufy, "topk": topk, "lte": lte, "plain": plain}


def train(
    method: str,
    source: str,
    out: Path,
    texts: Sequence[Path],
    options: Options,
    held_out: Path | None = None,
    progress: Progress = silent,
) -> Path:
    """Trains a model to fire less; an unfinished run in `out` goes on. Returns `out`.

    method: one of `RECIPES`; source: whatever `resolve` takes. Raises `ValueError` for options that cannot be met or
    that an unfinished run did not have, `FewfireError` where files are at fault.
    """
    options.check()
    if options.adapter and method in ("topk", "lte"):
        raise ValueError(f"no adapter can hold what {method} chooses neurons with: leave --adapter out")
    if options.reconstruct and method != "relufy":
        raise ValueError(f"--reconstruct is for relufy, not for {method}")
    if options.start and method != "relufy":
        raise ValueError(f"--start is for relufy, not for {method}")
    if adapter_of(source):
        raise ValueError(f"{source} has been trained already: name the model that it was made from")
    if (out / "config.json").exists():
        raise ValueError(f"{out} has a model already: choose another directory")
    begun = (out / TRAINING / STATE).exists()
    if (out / export.ADAPTER).exists() and not begun:
        raise ValueError(f"{out} has an adapter already: choose another directory")
    path = resolve(source, progress)
    checkpoint = open_checkpoint(path)
    earlier = open_adapter(Path(options.start)) if options.start else None
    beginning = Adapted(checkpoint, earlier) if earlier else checkpoint
    if earlier and (earlier.method != "relufy" or "hidden_act" not in earlier.config):
        raise ValueError(f"--start goes on from what relufy has left, and {options.start} is by {earlier.method[:80]}")
    corpus = _corpus(checkpoint, texts, held_out, options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    original = Network.from_checkpoint(checkpoint, progress).to(device).eval().requires_grad_(False)
    network = Network.from_checkpoint(beginning, progress).to(device)
    if method == "relufy" and options.activation is None:
        options = replace(options, activation=usual(network.config))
    key = f"{fingerprint(path)}-{corpus.key()}-{TOP}" + ("-bf16" if options.bf16 else "")
    teacher = TeacherCache(cache_dir() / "teachers" / key, original, corpus.windows, TOP, key)
    steps = max(1, options.tokens // (options.batch * corpus.windows.shape[1]))
    if options.down or options.reconstruct:
        lora.add_biases(network)
    recipe = RECIPES[method](Setup(network, corpus, options, steps))
    export.check(network, checkpoint, recipe.result(), bool(options.rank or options.adapter))
    if options.reconstruct and not begun:
        reconstruct(network, original, corpus.windows, progress)
    if options.layerwise:
        recipe = Layerwise(recipe, original, options.layerwise)
    lora.choose(network, options.rank, options.seed, ("down",) if options.down else lora.PROJECTIONS)
    plan = Plan(
        steps=steps,
        rate=options.rate or (1e-3 if options.rank else 1e-4),
        batch=options.batch,
        at_once=min(options.batch, max(1, AT_ONCE // options.window)),
        bf16=options.bf16,
        labels=options.labels,
        seed=options.seed,
    )
    about = {"method": method, **asdict(options), "model": fingerprint(path), "text": corpus.key()}
    about |= {"start": fingerprint(earlier.path)} if earlier else {}
    name, named = Path(os.path.abspath(out)).name, [card.Text.of(file) for file in texts]
    measured_with = card.Text.of(held_out) if held_out else None
    before = Spent.of(earlier)
    made = card.Made(name, method, card.Base.of(source, path), options.chosen(), named, measured_with, str(before))
    trainer = Trainer(network, corpus, teacher, recipe, plan, out / TRAINING, about, progress)
    trainer.run()
    _export(trainer, checkpoint, out, made, options, before)
    return out


class Spent(NamedTuple):
    """What earlier trainings have spent on an adapter that this one goes on from."""

    tokens: int = 0
    hours: float = 0.0

    @classmethod
    def of(cls, earlier: Adapter | None) -> Spent:
        """As the adapter says; nothing without one. Raises `CheckpointError` if what it says is no number."""
        if earlier is None:
            return cls()
        about = Fields(earlier.about, str(earlier.path))
        return cls(about.whole("tokens", 0, 1 << 50, default=0), about.number("hours", 0, 1e6, default=0.0))

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens in {self.hours:.2f} hours" if self.tokens else ""


def _export(
    trainer: Trainer, checkpoint: Checkpoint, out: Path, made: card.Made, options: Options, before: Spent
) -> None:
    """Writes what has been trained, and then removes the state, which nothing needs any more."""
    entries = log.read(out / TRAINING / log.NAME)
    measured, last = log.measurements(entries), log.steps(entries)[-1]
    about = {
        "tokens": before.tokens + last["tokens"],
        "hours": round(before.hours + last["seconds"] / 3600, 2),
        "perplexity": measured[-1]["perplexity"],
        "perplexity of the original": measured[0]["original"],
        "zeros": measured[-1]["zeros"],
        "options": asdict(options) | options.chosen(),
    }
    result = trainer.method.result()
    path = out / export.ADAPTER
    small = bool(options.rank or options.adapter) and result.sparsity is None
    if small:
        base, method = made.base.name, made.method
        export.write_adapter(trainer.network, checkpoint, result, path, base=base, method=method, about=about)
    readme = card.write(made, entries, path.name if small else None)
    export.write(trainer.network, checkpoint, result, out, readme, with_adapter=small)
    trainer.forget()


def _corpus(checkpoint: Checkpoint, texts: Sequence[Path], held_out: Path | None, options: Options) -> Corpus:
    tokenizer, config = Tokenizer.from_json(checkpoint.tokenizer_json()), checkpoint.config
    documents = [document for path in texts for document in text.read_documents(path)]
    corpus = text.build(tokenizer, config, documents, options.window, options.seed, HELD_OUT)
    if held_out is None:
        return corpus
    measured = text.build(tokenizer, config, text.read_documents(held_out), options.window, options.seed, 0)
    windows = np.concatenate([measured.held_out, measured.windows])[:HELD_OUT]
    return Corpus(np.concatenate([corpus.held_out, corpus.windows]), windows)
