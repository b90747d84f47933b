"""How well neurons are predicted, by rank and input: `python -m perf.predictors MODEL TEXT`.

A part of the text (`--part`) goes through a packed model in NumPy, and in some layers predictors are fitted to three
quarters of it. The rest says what each loses at a density, and how many of the neurons it finds that the exact
selection of the same density keeps (the largest |h| by what down makes of them). "guess" is the fit before it is
refined, `scores.guessed`; "gate" knows the gates exactly, but has read all gate rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fewfire.observe import Layer, Observation
from fewfire.packed import TOKENIZER, Packed, open_packed
from fewfire.quantize import row_bytes
from fewfire.selectors import lowrank, router, scores, threshold
from fewfire.selectors.fits import Fit, ffn_energy
from fewfire.selectors.predicted import predicted
from fewfire.sparsity import predictor_quality
from fewfire.tokenizer import Tokenizer
from fewfire.windows import windows
from perf import machine, results
from perf.spread import rounded
from perf.status import say
from perf.table import table
from perf.texts import part_of

DENSITIES = (0.3, 0.5, 0.7)
_WINDOW = 256
Fitter = Callable[[Packed, Layer], Fit]
_EARLY = ", early"  # ends the names of those that look at the attention's input: they could be done before the FFN's


def contenders(hidden: int, tokens: int, ranks: list[int]) -> dict[str, Fitter]:
    """What is compared when there are so many tokens to fit to, by name."""
    usual = lowrank.rank_of(hidden, tokens)
    found: dict[str, Fitter] = {f"rank {r}": partial(lowrank.fit, rank=r) for r in [*ranks, hidden]}
    found[f"rank {usual}, guess"] = _guess
    for rank in dict.fromkeys([usual, 2 * usual]):
        found[f"rank {rank}{_EARLY}"] = partial(_early, rank=rank)
    return found | {"router": router.fit}


def _guess(packed: Packed, layer: Layer) -> Fit:
    with patch.object(lowrank, "refined", lambda start, *_: start):
        return lowrank.fit(packed, layer)


def _early(packed: Packed, layer: Layer, rank: int) -> Fit:
    return lowrank.fit(packed, layer, rank=rank, inputs=layer.attn_in)


def compare(packed: Packed, layer: Layer, ranks: list[int], densities: list[float]) -> list[dict[str, Any]]:
    """All contenders on one layer."""
    held, down = scores.held_out(len(layer.fired)), layer.tensors["down.weight"]
    fired, energy = layer.fired[held], ffn_energy(packed, layer)[held]
    size = np.abs(fired) * threshold.down_weights(down)
    gate = np.abs(layer.gate[held]) * threshold.gate_weights(None if layer.up is None else layer.up[~held], down)
    exact = {d: size > np.quantile(size, 1 - d) for d in densities}
    of, hidden, neurons = packed.formats, layer.ffn_in.shape[1], fired.shape[1]
    row = row_bytes(of.rows, hidden)
    whole = neurons * (row * (2 if packed.config.gated else 1) + row_bytes(of.down, hidden))

    def judged(name: str, nbytes: int, kept: dict[float, np.ndarray]) -> dict[str, Any]:
        at = []
        for density, mask in kept.items():
            quality = predictor_quality(exact[density], mask)
            error = threshold.left_out(fired, mask, down, energy)
            at.append([rounded(v) for v in (error, quality.recall, quality.precision, quality.density)])
        return {"name": name, "layer": layer.number, "share_of_ffn": rounded(nbytes / whole), "at": at}

    found = [
        judged("exact", 0, exact),
        judged("gate", neurons * row, {d: gate > np.quantile(gate, 1 - d) for d in densities}),
    ]
    for name, fit in contenders(hidden, int((~held).sum()), ranks).items():
        say(f"layer {layer.number}: {name}")
        fitted = fit(packed, layer)
        nbytes = fitted["rows"].nbytes + (fitted["basis"].nbytes if "basis" in fitted else 0)
        filled = {d: lowrank.fill(packed, [fitted], [d]) for d in densities}
        # A predictor of one layer, so to the mask it is the first.
        first = replace(layer, number=0, ffn_in=layer.attn_in if name.endswith(_EARLY) else layer.ffn_in)
        found.append(judged(name, nbytes, {d: predicted(p, of, first)[held] for d, p in filled.items()}))
    return found


def predictor_table(result: dict[str, Any]) -> str:
    """Means over layers, in Markdown; errors in per mille of the energy of the residual stream."""
    rows = []
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        same = [row for row in result["rows"] if row["name"] == name]
        at = np.mean([row["at"] for row in same], axis=0)
        share = f"{np.mean([row['share_of_ffn'] for row in same]):.1%}"
        rows.append([name, share, *(f"{1000 * a[0]:.2f}, {a[1]:.0%}" for a in at)])
    return table(["", "read", *(f"{d:.0%} kept" for d in result["densities"])], rows)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    packed = open_packed(options.model)
    text = part_of(options.text.read_text(encoding="utf-8"), options.part)
    cut = windows(Tokenizer.from_file(options.model / TOKENIZER), packed.config, text, _WINDOW)
    count = min(len(cut), max(1, options.tokens // _WINDOW))
    cut = [cut[i * len(cut) // count] for i in range(count)]
    layers = options.layers or [round(packed.config.num_hidden_layers * s) for s in (0.1, 0.5, 0.9)]
    rows = []
    for layer in Observation(packed, cut):
        if layer.number in layers:
            rows += compare(packed, layer, options.ranks, options.densities)
        if layer.number == max(layers):
            break
    result = {
        "machine": machine.describe(),
        "model": packed.name,
        "weights": packed.weights,
        "text": options.text.name,
        "part": options.part,
        "tokens": sum(map(len, cut)),
        "layers": layers,
        "densities": options.densities,
        "rows": rows,
    }
    say("")
    print(predictor_table(result))
    results.finish(options.name, "predictors", result)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.predictors", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path, help="a packed model")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--part", default="0:0.6", help="share of the text's characters (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, from all over it (default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", help="which (default: three)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES), help="shares that are kept")
    parser.add_argument("--name", default="predictors", help="of the result; - keeps none (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
