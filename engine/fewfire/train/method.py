"""What a recipe adds to distillation: the trainer calls it around every step, and the export at the end.

Whatever it must remember between steps belongs into buffers or parameters of the network, which checkpoints keep, or
follows from the number of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fewfire.train.network import LayerState


@dataclass(frozen=True, eq=False)
class Result:
    """What a method has made of a model, besides the weights that have moved."""

    config: Mapping[str, Any] = field(default_factory=dict)  # fields of `ModelConfig` that change
    vectors: Mapping[str, Tensor] = field(default_factory=dict)  # by canonical name, as that config asks for them
    sparsity: Mapping[str, Any] | None = None  # contents of sparsity.json
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # of sparsity.safetensors


class Method:
    """Does nothing: plain distillation. Recipes override what they need."""

    def begin(self, step: int) -> None:
        """Before a step: sets whatever has a schedule."""

    def watch(self, ids: Tensor) -> None:
        """Before each forward pass of a step; `(B, T)` ids."""

    def observe(self, number: int, state: LayerState) -> None:
        """What layer `number` has computed in the pass."""

    def losses(self) -> dict[str, Tensor]:
        """After the pass: what is to be minimised besides the distillation loss, weighted; means over the tokens."""
        return {}

    def end(self, step: int) -> None:
        """After the weights have moved."""

    def figures(self) -> dict[str, float]:
        """What the log should have of the step."""
        return {}

    def result(self) -> Result:
        """After the last step."""
        return Result()
