"""The method `relufy`: activations with exact zeros in place of the model's own.

Of ReLU Strikes Back (2310.04564): stage 1, ReLU in the FFN (section 4.1); stage 2, ReLU after the norms as well
(section 4.2); shifted ReLU (section 5.3), here as a bias of the gate, -b at first, which may then move by neuron.
Of ProSparse (2402.13516, section 3.2): L1 regularization with a rising factor, and thresholds in place of the zero of
ReLU at the end, here one for each neuron and as high as the wanted sparsity asks for, where the paper has 0.01 for all.
And `threshold`: the original activation where it is large (CATS, 2404.08763), raised while training, which starts much
nearer to the original than ReLU does; `centred`: where it is far from the value near which the neuron idles, which
starts nearer still (`centre.py`).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fewfire.config import CENTRED, THRESHOLDED, Activation, ModelConfig
from fewfire.train.centre import add_bypasses, fit_centres
from fewfire.train.lora import add_biases
from fewfire.train.losses import l1, rising
from fewfire.train.method import Method, Result
from fewfire.train.network import LayerState, Network
from fewfire.train.rise import Rise
from fewfire.train.thresholds import Cuts, neuron_weights

Kind = Literal["threshold", "centred", "relu", "shifted"]
CALIBRATED = 8  # windows that weights and first thresholds are measured on
_LARGEST = 1e30  # a threshold that nothing is over


def thresholded(kind: Activation) -> Activation:
    """The name of an activation that is cut off at thresholds. Raises `ValueError` where the engine has none."""
    names = {base: name for name, base in THRESHOLDED.items() if name not in CENTRED}
    if kind not in names:
        raise ValueError(f"{kind} cannot be cut off at thresholds, only {', '.join(names)}: use --activation relu")
    return names[kind]


def usual(config: ModelConfig) -> Kind:
    """The kind that changes a model the least of those that it can have."""
    return "centred" if _centred(config) else "threshold"


def centred(config: ModelConfig) -> Activation:
    """The name of a model's activation, cut off around centres. Raises `ValueError` where the engine has none."""
    if name := _centred(config):
        return name
    known = ", ".join(THRESHOLDED[name] for name in CENTRED)
    raise ValueError(
        f"only gated FFNs with {known}, whose output is added to the stream as it is, can be centred: "
        "use --activation relu or threshold"
    )


def _centred(config: ModelConfig) -> Activation | None:
    if not config.gated or config.act_on_up or config.post_norms:
        return None
    act = config.hidden_act
    return act if act in CENTRED else {THRESHOLDED[name]: name for name in CENTRED}.get(act)


def shift(network: Network, by: float) -> None:
    """Adds -by to the biases of all gates, and biases of zero where a model has none."""
    add_biases(network)
    for layer in network.layers:
        with torch.no_grad():
            layer.gate.bias -= by


class Relufy(Method):
    """See the module. Changes the network's activations; `windows` `(windows, T)` are for the first thresholds.

    rise: the wanted share of zeros, None for the zeros that ReLU has by itself; stage: 2 for ReLU after the norms; by:
    the shift of shifted ReLU; regularization: ProSparse's last factor, here of the mean |activation| over neurons,
    layers and tokens, which does not depend on the model's size.
    """

    def __init__(
        self,
        network: Network,
        windows: np.ndarray,
        rise: Rise | None,
        steps: int,
        *,
        kind: Kind = "threshold",
        stage: int = 1,
        by: float = 0.0,
        regularization: float = 0.0,
        uniform: bool = False,
    ) -> None:
        self._late = kind not in ("threshold", "centred")  # thresholds come at the end
        if not self._late and rise is None:
            raise ValueError(f"--activation {kind} needs a --sparsity")
        own = network.config.hidden_act
        if own in CENTRED and kind != "centred":
            raise ValueError(f"the model is {own}: go on with --activation centred")
        base: Activation = "relu" if self._late else THRESHOLDED.get(own, own)
        self._name = centred(network.config) if kind == "centred" else thresholded(base)
        self._config = {"norm_relu": True} if stage == 2 else {}
        self._rise, self._steps, self._regularization = rise, steps, regularization
        self._zeros: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._factor = 0.0
        if stage == 2:
            for layer in network.layers:
                layer.norm_activation = nn.ReLU()
        windows, more = windows[:CALIBRATED], windows[: 2 * CALIBRATED]
        weights = neuron_weights(network, windows)
        centres = None
        if kind == "centred" and own in CENTRED:
            centres = [layer.activation.centre for layer in network.layers]
        elif kind == "centred" and rise is not None:
            centres = fit_centres(network, more, weights, rise.end)
            add_bypasses(network, centres)
        self._cuts = Cuts(network, base, weights, uniform, centres)
        if self._late:
            self._cuts.set(0.0)
        elif rise is not None:
            self._cuts.calibrate(network, windows, rise.sparsity(0))

    def begin(self, step: int) -> None:
        last = step == self._steps - 1
        moves = self._rise is not None and (last if self._late else self._rise.moves(step))
        self._cuts.track(moves)
        ends = [self._steps // 10, self._steps // 2, self._steps]
        self._factor = rising(step, ends, [self._regularization * share for share in (0.025, 0.25, 1.0)])
        self._zeros = []

    def watch(self, ids: Tensor) -> None:
        self._sizes = []

    def observe(self, number: int, state: LayerState) -> None:
        self._zeros.append((state.gate.detach() == 0).float().mean())
        if self._regularization:
            self._sizes.append(l1(state.fired) / state.fired.shape[-1])

    def losses(self) -> dict[str, Tensor]:
        return {"l1": torch.stack(self._sizes).mean() * self._factor} if self._sizes else {}

    def end(self, step: int) -> None:
        if self._rise is None:
            return
        if self._late and step == self._steps - 1:
            self._cuts.move(self._rise.end, by=1.0)
            for part in self._cuts.parts:  # where ReLU has more zeros by itself
                part.set(max(0.0, float(part.cut)))
        elif not self._late and self._rise.moves(step):
            self._cuts.move(self._rise.sparsity(step + 1))

    def figures(self) -> dict[str, float]:
        return {"zeros": float(torch.stack(self._zeros).mean())}

    def result(self) -> Result:
        if self._late and all(float(part.cut) == 0.0 for part in self._cuts.parts):
            return Result({"hidden_act": "relu", **self._config})
        limits = [part.least.clamp(0.0, _LARGEST) for part in self._cuts.parts]
        vectors = {f"layers.{i}.act_threshold.weight": limit for i, limit in enumerate(limits)}
        centres = {f"layers.{i}.act_centre.weight": part.centre for i, part in enumerate(self._cuts.parts)}
        vectors |= {name: centre for name, centre in centres.items() if centre is not None}
        return Result({"hidden_act": self._name, **self._config}, vectors)
