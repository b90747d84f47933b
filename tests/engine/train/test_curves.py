"""A run's log becomes a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the `plot` extra")

import matplotlib.image

from fewfire.train import curves


def entries(steps: int, **parts: float) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            losses = {name: value / step for name, value in parts.items()}
            log.append({"step": step, "loss": sum(losses.values()), **losses, "zeros": 0.5, "tokens": 100 * step})
        if step % 5 == 0:
            log.append({"step": step, "perplexity": 20 + step, "zeros": step / 30, "layers": [0.1, 0.9]})
    return [{**log[0], "original": 21.0}, *log[1:]]


@pytest.mark.parametrize(("steps", "parts"), [(1, {"kl": 1.0}), (20, {"kl": 1.0, "text": 3.0, "layers": 0.1, "l1": 2})])
def test_it_is_drawn(tmp_path: Path, steps: int, parts: dict[str, float]) -> None:
    path = tmp_path / "new" / "curves.png"
    curves.draw(entries(steps, **parts), path, "a title")
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] > 3 * picture.shape[0]
    assert math.isfinite(float(picture.std()))
    assert float(picture.std()) > 0.02  # something is on it


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    curves.draw(entries(0), tmp_path / "a.png", "a title")
    assert (tmp_path / "a.png").stat().st_size > 1000
