"""Training tiny models in seconds: a text of sentences made by a grammar, and a model that learns it from scratch."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fewfire.checkpoint import Checkpoint, open_checkpoint
from fewfire.tokenizer import Tokenizer
from fewfire.train.corpus import Corpus, build
from fewfire.train.method import Method
from fewfire.train.network import Network
from fewfire.train.teacher import TeacherCache
from fewfire.train.trainer import Plan, Trainer

torch.set_num_threads(1)  # results are the same bit for bit only with the same number of threads

WINDOW = 32
_WHO = ("the keeper", "a visitor", "the boat", "nobody", "the lamp", "an old captain")
_DOES = ("writes in", "waits for", "turns to", "forgets", "has seen", "speaks of")
_WHAT = ("the book", "the wind", "the water", "the hill", "winter", "the rocks")


def sentences(count: int, seed: int = 0) -> str:
    """Text that a small model can learn, but not by heart."""
    draw = random.Random(seed)
    return " ".join(f"{draw.choice(_WHO)} {draw.choice(_DOES)} {draw.choice(_WHAT)}." for _ in range(count))


def corpus(checkpoint: Checkpoint, count: int = 800, seed: int = 0) -> Corpus:
    """Windows of the grammar's sentences."""
    tokenizer = Tokenizer.from_json(checkpoint.tokenizer_json())
    return build(tokenizer, checkpoint.config, [sentences(count, seed)], WINDOW, seed, held_out=8)


@dataclass
class Learned:
    """A checkpoint, a network of it that has been trained, its text, and a cache of what it predicts there."""

    checkpoint: Checkpoint
    network: Network
    corpus: Corpus
    directory: Path

    def student(self) -> Network:
        """A copy of the network to train."""
        tensors = {name: value.detach().clone().numpy() for name, value in self.network.state_dict().items()}
        return Network(self.checkpoint.config, tensors)

    def teacher(self, k: int = 32) -> TeacherCache:
        """What the network predicts."""
        return TeacherCache(self.directory / f"teacher-{k}", self.network, self.corpus.windows, k, "learned")

    def divergence(self, student: Network) -> float:
        """KL(network || student) of the held-out windows' next tokens, in nats, exact."""
        ids = torch.from_numpy(self.corpus.held_out.astype(np.int64))
        with torch.no_grad():
            log_p, log_q = (network.eval()(ids).log_softmax(-1) for network in (self.network, student))
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    def train(self, student: Network, method: Method, plan: Plan, directory: Path, minutes: float = 5.0) -> Trainer:
        """Distils the network into a student."""
        trainer = Trainer(student, self.corpus, self.teacher(), method, plan, directory, {}, minutes=minutes)
        trainer.run()
        return trainer


def learn(
    path: Path, directory: Path, install: Callable[[Network], Method] = lambda network: Method(), steps: int = 120
) -> Learned:
    """All weights of a tiny random model learn the text; `install` changes the network before."""
    checkpoint = open_checkpoint(path)
    network, text = Network.from_checkpoint(checkpoint), corpus(checkpoint)
    network.requires_grad_(True)
    method = install(network)
    teacher = TeacherCache(directory / "unused", network, text.windows, 1, "unused")
    plan = Plan(steps, rate=4e-3, batch=8, at_once=8, labels=1.0)
    Trainer(network, text, teacher, method, plan, directory, {}).run()
    network.requires_grad_(False)
    return Learned(checkpoint, network, text, directory)
