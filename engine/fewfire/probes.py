"""What an error in a layer means to the predictions: measured by leaving something out in that layer alone.

The same share of a layer's output lost does more harm in one layer than in another. Where a model has too many layers
to probe each by itself, neighbours are probed together.
"""

from __future__ import annotations

import numpy as np

from fewfire import damage
from fewfire.calibration import WORK, Calibration
from fewfire.selectors.fits import Fit
from fewfire.selectors.methods import KINDS
from fewfire.windows import some

_PROBED = 384  # tokens that tell what a layer's error means, at most
_PROBE_DENSITY = 0.3  # whose error, in the middle layer, all layers are probed at


def weights(work: Calibration, kind: str) -> list[float]:
    """What an error of 1 in each layer's output means to the predictions: nats of KL divergence."""
    probe = KINDS[kind].probe
    if probe is None:
        return [1.0]
    fits, count = work.fits(probe), work.packed.config.num_hidden_layers
    decodes = WORK / work.packed.bytes_per_token()
    tokens = max(48, min(_PROBED, int(decodes / count)))
    groups = np.array_split(np.arange(count), max(1, min(count, int(decodes / tokens))))
    middle = fits[count // 2]
    density = _PROBE_DENSITY * float(middle.get("firing", 1.0))  # what is zero anyway does no damage
    level = float(np.interp(density, middle["densities"], middle["errors"]))
    found, cut = list[float](), some(work.fitted, tokens)
    dense = work.dense(f"dense-probe-{tokens}", cut)
    for number, group in enumerate(groups):
        picked = [_density_for(fit, level) if i in group else 1.0 for i, fit in enumerate(fits)]

        def compute(picked: list[float] = picked, number: int = number) -> float:
            work.model.engine.select(work.selection(probe, {probe: picked}), progress=work.progress)
            work.progress(f"probing {probe}", number, len(groups))
            return float(damage.measure(work.model, cut, dense).kl.mean())

        kl = work.notebook.number(f"probe {probe} {group[0]}-{group[-1]}", compute)
        error = sum(float(np.interp(picked[i], fits[i]["densities"], fits[i]["errors"])) for i in group)
        found += [max(kl, 1e-9) / max(error, 1e-12)] * len(group)
    work.progress(f"probing {probe}", len(groups), len(groups))
    return found


def _density_for(fit: Fit, error: float) -> float:
    """The density at which a layer loses so much, in the range that was fitted."""
    found = float(np.interp(-error, -fit["errors"], fit["densities"]))
    return min(max(found, float(fit["densities"][0])), 0.95)
