"""How fast a model reads a prompt and how fast it writes, on this machine.

As llama-bench does it: a prompt read into an empty context ("pp512"), and tokens read one by one, as in generation,
from an empty context on ("tg128"). Choosing the next token is no part of it. One run before the ones that count warms
caches, and reads weights that are mapped. The tokens are a text's, where llama-bench has random ones: how much a
selection leaves out of those says nothing.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewfire.calibrate import sample_text
from fewfire.progress import Progress, silent

if TYPE_CHECKING:
    from fewfire.model import Model


@dataclass(frozen=True)
class Timing:
    """One test: the seconds that each run took for so many tokens."""

    test: str
    tokens: int
    seconds: tuple[float, ...]
    method: str = "dense"  # what decided what was left out

    @property
    def speeds(self) -> tuple[float, ...]:
        """Tokens per second of each run."""
        return tuple(self.tokens / s for s in self.seconds)

    @property
    def median(self) -> float:
        """The median of the runs, tokens per second."""
        return statistics.median(self.speeds)

    @property
    def deviation(self) -> float:
        """The runs' standard deviation, tokens per second; 0 for a single run."""
        return statistics.stdev(self.speeds) if len(self.seconds) > 1 else 0.0


def bench(
    model: Model, *, prompt: int = 512, tokens: int = 128, repeat: int = 5, progress: Progress = silent
) -> list[Timing]:
    """Times reading `prompt` tokens at once and `tokens` one by one, `repeat` times each; 0 leaves a test out.

    A prompt is read with all weights, tokens with what the model's selection leaves.
    """
    for name, value in (("prompt", prompt), ("tokens", tokens)):
        if not 0 <= value <= model.context:
            raise ValueError(f"{name} must be from 0 to the model's context of {model.context} tokens, not {value}")
    if repeat < 1:
        raise ValueError(f"repeat must be at least 1, not {repeat}")
    if not prompt and not tokens:
        raise ValueError("prompt and tokens are both 0, so there is nothing to time")
    tests = [("pp", prompt), ("tg", tokens)]
    return [_timing(model, name, count, repeat, progress) for name, count in tests if count]


def _timing(model: Model, name: str, count: int, repeat: int, progress: Progress) -> Timing:
    """Reads `count` tokens, a prompt ("pp") at once and others one by one."""
    test, prompt = f"{name}{count}", name == "pp"
    text = model.tokenizer.encode(sample_text())
    ids, session, seconds = (text * -(-count // len(text)))[:count], model.session(), []
    for run in range(repeat + 1):
        progress(f"timing {test}", run, repeat + 1)
        session.rewind(0)
        start = time.perf_counter()
        for part in [ids] if prompt else [[token] for token in ids]:
            session.feed(part, prompt=prompt)
        seconds.append(time.perf_counter() - start)
    return Timing(test, count, tuple(seconds[1:]), "dense" if prompt else model.engine.method)
