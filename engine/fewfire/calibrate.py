"""Calibrating: from a sample text to the selection that leaves out most for a density or a budget of quality.

`calibration.py` says what the steps are. A budget is kept on a part of the sample that nothing was fitted to, with a
margin for the error of the measurement. Promises that the calibration is there whole at the end or the old one still
is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from fewfire import choosing
from fewfire.calibration import Calibration
from fewfire.errors import FewfireError
from fewfire.progress import Progress, silent
from fewfire.selectors import store
from fewfire.selectors.methods import missed, parse, usual
from fewfire.selectors.store import About
from fewfire.trials import Trial, adjusted, fastest, scored, trial

if TYPE_CHECKING:
    from fewfire.model import Model


def sample_text() -> str:
    """The default sample: what the default model says by itself, between text that people wrote (perf/sample.py)."""
    return (Path(__file__).parent / "sample.txt").read_text(encoding="utf-8")


def calibrate(
    model: Model,
    *,
    method: str | None = None,
    density: float | None = None,
    budget: float | None = None,
    text: str | None = None,
    progress: Progress = silent,
) -> About:
    """Calibrates a model, writes the result next to its weights, and lets the model use it. Returns what was measured.

    method: one of `selectors.methods.METHODS`, or several joined with "+"; None: with a budget, the fastest of
    `selectors.methods.usual`. density: the share of the bytes of the rows which the method may leave out that is to be
    read, on average, over 0 and at most 1. budget: by how much perplexity may grow, 0.01 for 1 %. Exactly one of the
    two. text: sample text of the user's. The engine is borrowed meanwhile: sessions in other threads wait.

    Raises `ValueError` for an impossible option, a text that is too short, or a model that was trained with a
    selection, which would be lost; `FewfireError` if no setting keeps the budget, the model is being calibrated
    already, or the result cannot be written; it then uses what it used before.
    """
    check(method, density, budget)
    if store.is_trained(model.packed):
        raise ValueError(
            f"{model.packed.name} was trained with a choice of its neurons, which a calibration would replace: "
            "use it as it is, or calibrate the model that it was made from"
        )
    store.check_writable(model.packed)
    name = "the default sample" if text is None else "text of the user's"
    work = Calibration(model, sample_text() if text is None else text, progress)
    with closing(work.notebook), model.engine.borrowed():
        if density is not None:
            assert method is not None
            picked = adjusted(work, method, density, choosing.spread(work, method))
            trials = [trial(work, method, picked, scored(work), f"measuring {method}")]
        else:
            assert budget is not None
            trials = _within_budget(work, (method,) if method else usual(model.packed), budget)
        best, speedup, gain = fastest(work, trials)
        if budget is not None and gain <= 1:
            raise FewfireError(
                f"nothing that keeps perplexity within {100 * budget:g} % is faster than no calibration: the best, "
                f"{trials[best].method}, is {gain:.2f} times as fast; allow more"
            )
        chosen, asked = trials[best], {"density": density} if density is not None else {"budget": budget}
        about = About(
            method=chosen.method,
            density=chosen.density,
            densities=chosen.densities,
            settings=asked,
            sample=name,
            **chosen.measured,
            dense_bytes_per_token=model.packed.bytes_per_token(),
            speedup=speedup,
            missed=missed({kind: work.fits(kind) for kind in chosen.densities}, chosen.densities),
            tried=[{"method": t.method, "density": t.density, **t.measured} for t in trials],
        )
        selected = work.as_loaded(chosen.method, chosen.densities)
        store.save(model.packed, selected, about)
        work.notebook.remove()
    model.engine.select(selected)
    return about


def check(method: str | None, density: float | None, budget: float | None) -> None:
    """Raises `ValueError` for options that `calibrate` does not take."""
    if (density is None) == (budget is None):
        raise ValueError("give either a density or a budget, and not both")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must be over 0 and at most 1, not {density:g}")
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"budget must be over 0 (0.01 is 1 %), not {budget:g}")
    if method is None and density is not None:
        raise ValueError("a density needs a method: name one, or give a budget")
    if method is not None:
        parse(method)


def _within_budget(work: Calibration, methods: Sequence[str], budget: float) -> list[Trial]:
    """For each of the methods that can keep the budget, the setting that reads least."""
    work.fit(methods)
    found, start = list[Trial](), math.log1p(budget)
    for method in methods:
        best = choosing.within(work, budget, method, start, f"trying {method}")
        if best is not None:
            tried, start = best  # damages are predicted too high or too low by about the same for the next method
            found.append(tried)
    if not found:
        raise FewfireError(
            f"no setting of {', '.join(methods)} keeps perplexity within {100 * budget:g} % on this sample: "
            "allow more, or give more --text"
        )
    return found
