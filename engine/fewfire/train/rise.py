"""The sparsity that is wanted at each step: raised while the model learns, which keeps it near the original."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rise:
    """From `start` to `end`, faster at first, over the first `share` of the steps; fixed in the last `rest` of them."""

    end: float
    steps: int
    start: float = 0.5
    share: float = 0.6
    rest: float = 0.1

    def sparsity(self, step: int) -> float:
        """What is wanted at a step."""
        done = min(1.0, step / max(1.0, self.share * self.steps))
        return self.end + (min(self.start, self.end) - self.end) * (1 - done) ** 2

    def moves(self, step: int) -> bool:
        """Whether what depends on the sparsity still moves: in the end the model learns with what it will have."""
        return step < (1 - self.rest) * self.steps
