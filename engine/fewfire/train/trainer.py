"""The training loop: distillation with AdamW, and everything on disk that lets a killed run go on as if nothing was.

A run belongs to a directory: `state.pt` is the last checkpoint, written to another name and renamed, `log.jsonl` has
one object a line, of steps and of measurements. A resumed run sees the windows, losses and log of an unbroken one, bit
for bit on the same machine with the same number of threads. Knows nothing of sparsity: that is the method's.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fewfire.errors import FewfireError
from fewfire.progress import Progress, silent
from fewfire.train import log
from fewfire.train.corpus import Corpus
from fewfire.train.lora import trainable
from fewfire.train.losses import TopLogits, distillation
from fewfire.train.measure import measure
from fewfire.train.method import Method
from fewfire.train.network import Network
from fewfire.train.teacher import TeacherCache
from fewfire.train.whole import whole

STATE = "state.pt"
AT_ONCE = 256  # tokens whose logits over the whole vocabulary are in memory


@dataclass(frozen=True)
class Plan:
    """How long, how much at a time, how fast."""

    steps: int
    rate: float  # AdamW's learning rate after the warm-up, from where it falls along a cosine
    batch: int = 2  # windows of a step
    at_once: int = 2  # windows of a forward pass: gradients of several passes add up to a step
    warmup: float = 0.03  # share of the steps in which the rate rises
    floor: float = 0.05  # of the rate that is left at the end
    labels: float = 0.0  # share of the text's own next tokens in the loss; the rest is the teacher's
    bf16: bool = False  # matrix products in bfloat16, the rest and all weights in float32
    clip: float = 1.0  # largest norm of a step's gradient
    seed: int = 0
    measured: int = 10  # how often in all the held-out windows are measured, besides before the first step

    def learning_rate(self, step: int) -> float:
        """The rate of a step: linear warm-up, then a cosine."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


class Trainer:
    """One run. `about` says what it depends on besides its plan: a directory with another run in it is not touched."""

    def __init__(
        self,
        network: Network,
        corpus: Corpus,
        teacher: TeacherCache,
        method: Method,
        plan: Plan,
        directory: Path,
        about: Mapping[str, Any],
        progress: Progress = silent,
        minutes: float = 5.0,  # between two checkpoints
    ) -> None:
        self.network, self.corpus, self.teacher, self.method, self.plan = network, corpus, teacher, method, plan
        self._directory, self._progress, self._minutes = directory, progress, minutes
        self._about = json.loads(json.dumps({**asdict(plan), **about}))
        parameters = [parameter for _, parameter in trainable(network)]
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(parameters, lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.step, self._measured, self._logged = 0, -1, 0
        self._seconds = self._began = 0.0  # at work so far; when that was added up last
        directory.mkdir(parents=True, exist_ok=True)
        self._resume()

    def run(self) -> None:
        """Trains to the end. On Ctrl-C writes a checkpoint and raises `KeyboardInterrupt`."""
        saved = self._began = time.monotonic()
        try:
            while True:
                self._measure()
                finished = self.step == self.plan.steps
                if finished or time.monotonic() - saved > 60 * self._minutes:
                    self.save()
                    saved = time.monotonic()
                if finished:
                    return
                self._progress("training", self.step, self.plan.steps)
                self._train()
        except KeyboardInterrupt:
            self.save()
            raise

    def _train(self) -> None:
        """One step."""
        plan, step = self.plan, self.step
        self.network.train()
        self.method.begin(step)
        self._optimizer.zero_grad(set_to_none=True)
        chosen = self._windows(step)
        parts = [chosen[at : at + plan.at_once] for at in range(0, len(chosen), plan.at_once)]
        sums: dict[str, float] = {}
        for part in parts:
            with self._precision():
                found = self._pass(part, len(part) / len(chosen))
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, plan.clip))
        if not math.isfinite(norm):
            raise FewfireError(f"training left the finite numbers at step {step}: try a lower learning rate")
        rate = plan.learning_rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with whole():
            self._optimizer.step()
            self.method.end(step)
            self.step += 1
            tokens = self.step * plan.batch * self.corpus.windows.shape[1]
            figures = {**sums, **self.method.figures(), "norm": norm, "rate": rate, "tokens": tokens}
            now = time.monotonic()
            self._seconds, self._began = self._seconds + now - self._began, now
            self._write({"step": self.step, **figures, "seconds": round(self._seconds, 1)})

    def _precision(self) -> torch.autocast:
        """Of matrix products in a forward pass."""
        return torch.autocast(self.network.embed.weight.device.type, torch.bfloat16, enabled=self.plan.bf16)

    def _pass(self, chosen: np.ndarray, share: float) -> dict[str, float]:
        """Forward and backward over some windows that are a share of the step's."""
        device = self.network.embed.weight.device
        ids = torch.from_numpy(self.corpus.windows[chosen].astype(np.int64)).to(device)
        self.method.watch(ids)
        hidden = self.network.hidden(ids, self.method.observe)
        states = hidden.detach().requires_grad_()  # the head's part of the backward pass comes first, piece by piece
        parts = {}
        if self.plan.labels < 1:
            parts["kl"] = self._distil(states, self.teacher.logits(chosen), (1 - self.plan.labels) * share)
        if self.plan.labels > 0:
            parts["text"] = self._predict(states, ids, self.plan.labels * share)
        extra = {name: loss * share for name, loss in self.method.losses().items()}
        torch.autograd.backward([hidden, *extra.values()], [states.grad, *map(torch.ones_like, extra.values())])
        parts |= {name: loss.item() for name, loss in extra.items()}
        return {"loss": sum(parts.values()), **parts}

    def _distil(self, states: Tensor, teacher: TopLogits, weight: float) -> float:
        """The distillation loss of `(B, T, hidden)` states, times a weight; adds its gradient to theirs."""
        flat = states.flatten(0, 1)
        parts = TopLogits(teacher.values.flatten(0, 1), teacher.ids.flatten(0, 1), teacher.total.flatten())
        total = 0.0
        for at in range(0, len(flat), AT_ONCE):
            part = slice(at, at + AT_ONCE)
            loss = distillation(self.network.logits(flat[part]).float(), TopLogits(*(each[part] for each in parts)))
            total += self._descend(loss, weight * len(flat[part]) / len(flat))
        return total

    def _predict(self, states: Tensor, ids: Tensor, weight: float) -> float:
        """The loss of predicting the text itself, likewise; nothing follows the last token of a window."""
        flat, targets = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        total = 0.0
        for at in range(0, len(flat), AT_ONCE):
            part = slice(at, at + AT_ONCE)
            loss = functional.cross_entropy(self.network.logits(flat[part]).float(), targets[part])
            total += self._descend(loss, weight * len(flat[part]) / len(flat))
        return total

    @staticmethod
    def _descend(loss: Tensor, weight: float) -> float:
        loss = loss * weight
        loss.backward()
        return loss.item()

    def _windows(self, step: int) -> np.ndarray:
        """The numbers of a step's windows: the corpus in one order after another, without end."""
        count, first = len(self.corpus.windows), step * self.plan.batch
        places = np.arange(first, first + self.plan.batch)
        orders = {epoch: self.corpus.order(self.plan.seed, epoch) for epoch in sorted(set((places // count).tolist()))}
        return np.array([orders[place // count][place % count] for place in places.tolist()])

    def _measure(self) -> None:
        """Measures the held-out windows if this step is one after which that is due and has not been done."""
        every = max(1, self.plan.steps // self.plan.measured)
        if self._measured == self.step or (self.step % every and self.step < self.plan.steps):
            return
        found = asdict(measure(self.network, self.corpus.held_out))
        if self.step == 0:
            found["original"] = measure(self.teacher.network, self.corpus.held_out).perplexity
        with whole():
            self._measured = self.step
            self._write({"step": self.step, **found})

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._logged = log.append(self._directory / log.NAME, entry)

    def save(self) -> None:
        """Writes a checkpoint of the last whole step."""
        state = {
            "about": self._about,
            "step": self.step,
            "seconds": self._seconds,
            "measured": self._measured,
            "log": self._logged,
            "parameters": {name: parameter.detach() for name, parameter in trainable(self.network)},
            "buffers": dict(self.network.named_buffers()),
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        temporary = self._directory / f".{STATE}.{os.getpid()}"
        with whole():
            try:
                with temporary.open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._directory / STATE)
            finally:
                temporary.unlink(missing_ok=True)

    def forget(self) -> None:
        """Removes the checkpoint: the run is over, and its result is elsewhere."""
        (self._directory / STATE).unlink(missing_ok=True)

    def _resume(self) -> None:
        """Goes back to the last checkpoint, if there is one; the log forgets what came after it."""
        torch.manual_seed(self.plan.seed)
        path, logged = self._directory / STATE, self._directory / log.NAME
        if not path.exists():
            logged.unlink(missing_ok=True)
            return
        try:
            state = torch.load(path, map_location=self.network.embed.weight.device, weights_only=True)
            different = [name for name in self._about if state["about"].get(name) != self._about[name]]
            if different:
                was, now = state["about"].get(different[0]), self._about[different[0]]
                raise ValueError(
                    f"{self._directory} has an unfinished run with another {different[0]} ({was}, not {now}): "
                    "go on with the same options, or choose another directory"
                )
            named = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
            with torch.no_grad():
                for name, value in (state["parameters"] | state["buffers"]).items():
                    named[name].copy_(value)
            self._optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"].cpu())
            self.step, self._measured, self._seconds = state["step"], state["measured"], state["seconds"]
            self._logged = state["log"]
            os.truncate(logged, self._logged)
        except (OSError, KeyError, RuntimeError, EOFError) as error:
            raise FewfireError(f"{path} cannot be read ({error}): delete it to begin anew") from None
