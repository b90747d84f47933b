"""A training run from a user's words to a finished directory: opens the model, builds the corpus, trains, exports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from fewfire.cache import cache_dir
from fewfire.checkpoint import Checkpoint, fingerprint, open_checkpoint
from fewfire.progress import Progress, silent
from fewfire.sources import resolve
from fewfire.tokenizer import Tokenizer
from fewfire.train import corpus as text
from fewfire.train import lora, relufy
from fewfire.train.corpus import Corpus
from fewfire.train.method import Method
from fewfire.train.network import Network
from fewfire.train.teacher import TeacherCache
from fewfire.train.trainer import Plan, Trainer

TOP = 64  # logits of the teacher that are kept for a token
HELD_OUT = 16  # windows that are measured


@dataclass(frozen=True)
class Options:
    """What a user may choose."""

    tokens: int = 1_000_000
    sparsity: float = 0.8
    rank: int = 0  # of the updates; 0: all weights of the projections move
    window: int = 512
    batch: int = 2  # windows of a step
    rate: float | None = None  # None: 1e-4, or 1e-3 for low-rank updates
    layerwise: float = 0.0  # weight of the layers' relative errors
    uniform: bool = False  # the same sparsity in all layers
    seed: int = 0


def train(
    source: str,
    out: Path,
    texts: Sequence[Path],
    options: Options,
    held_out: Path | None = None,
    progress: Progress = silent,
) -> Path:
    """Trains a model to fire less; an unfinished run in `out` goes on. Returns `out`."""
    path = resolve(source, progress)
    checkpoint = open_checkpoint(path)
    corpus = _corpus(checkpoint, texts, held_out, options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    original = Network.from_checkpoint(checkpoint, progress).to(device).eval().requires_grad_(False)
    network = Network.from_checkpoint(checkpoint, progress).to(device)
    key = f"{fingerprint(path)}-{corpus.key()}-{TOP}"
    teacher = TeacherCache(cache_dir() / "teachers" / key, original, corpus.windows, TOP, key)
    steps = max(1, options.tokens // (options.batch * corpus.windows.shape[1]))
    lora.choose(network, options.rank, options.seed)
    relufy.Thresholds.install(network, relufy.neuron_weights(original, corpus.windows[:8]))
    method: Method = relufy.Thresholds(network, relufy.Rise(options.sparsity, steps), options.uniform)
    if options.layerwise:
        method = relufy.Residuals(method, original, options.layerwise)
    plan = Plan(
        steps, options.rate or (1e-3 if options.rank else 1e-4), options.batch, min(2, options.batch), seed=options.seed
    )
    about = {**asdict(options), "model": fingerprint(path), "text": corpus.key()}
    Trainer(network, corpus, teacher, method, plan, out / "training", about, progress).run()
    return out


def _corpus(checkpoint: Checkpoint, texts: Sequence[Path], held_out: Path | None, options: Options) -> Corpus:
    tokenizer, config = Tokenizer.from_json(checkpoint.tokenizer_json()), checkpoint.config
    documents = [document for path in texts for document in text.read_documents(path)]
    corpus = text.build(tokenizer, config, documents, options.window, options.seed, HELD_OUT)
    if held_out is None:
        return corpus
    measured = text.build(tokenizer, config, text.read_documents(held_out), options.window, options.seed, 0)
    windows = np.concatenate([measured.held_out, measured.windows])[:HELD_OUT]
    return Corpus(np.concatenate([corpus.held_out, corpus.windows]), windows)
