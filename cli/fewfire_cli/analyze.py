"""`fewfire analyze`: how few of a model's neurons matter, as a table, as JSON, as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fewfire_cli import options, terminal
from fewfire_cli.progress import ProgressBar
from fewfire_cli.text import read_text
from fewfire_cli.tradeoff import table

if TYPE_CHECKING:
    from fewfire.analyze import Analysis, LayerSparsity
    from fewfire.packed import Packed
    from fewfire.selectors import Selection

_WINDOW = 512
_DENSITIES = [0.9, 0.7, 0.5, 0.3]
_RUNS = (8, 32, 128)  # tokens in a row that the table shows


def _picture(_: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value and value.suffix and value.suffix.lower() != ".png" and not value.is_dir():
        raise click.BadParameter(f"{str(value)!r} is neither a directory nor a file that ends in .png", param=param)
    return value


def _methods(_: click.Context, __: click.Parameter, value: str | None) -> list[str]:
    return [name.strip() for name in value.split(",")] if value else []


def _densities(_: click.Context, param: click.Parameter, value: str | None) -> list[float]:
    try:
        return [float(share) for share in value.split(",")] if value else []
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of shares like 0.7,0.5,0.3", param=param) from None


@click.command()
@click.argument("model", default=options.DEFAULT_MODEL)
@options.weights_option
@click.option("--dense", is_flag=True, help="Do not judge the predictor of a calibration.")
@click.option("--text", type=click.Path(path_type=Path), help="A text file to read.  [default: a sample of our own]")
@click.option(
    "--tokens", default=2048, show_default=True, help="Read the first so many tokens; with --methods, score so many."
)
@click.option(
    "--methods",
    callback=_methods,
    metavar="M,..",
    help="Measure what these cost, instead: see fewfire calibrate --help.",
)
@click.option(
    "--densities",
    callback=_densities,
    metavar="D,..",
    help="With --methods: shares to read of what a method may leave out.  [default: 0.9,0.7,0.5,0.3]",
)
@click.option("--json", "as_json", is_flag=True, help="Everything that was measured, as a JSON object.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    callback=_picture,
    metavar="DIR|FILE.png",
    help="Draw pictures: one each in a directory, or all on a page. Needs fewfire[plot].",
)
def analyze(
    model: str,
    weights: str,
    dense: bool,
    text: Path | None,
    tokens: int,
    methods: list[str],
    densities: list[float],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Emergent sparsity of MODEL: how few neurons matter to a token, layer by layer.

    Measured with every neuron computed, in the manner of the papers on lazy neurons. If MODEL has been calibrated with
    a predictor, says how well that predicts.

    With --methods, how much worse the predictions get when methods leave weights out: each is calibrated on a part of
    the text and judged on the rest. MODEL is left as it is.

    \b
    Example:
      fewfire analyze smollm2
      fewfire analyze smollm2 --text book.txt --plot smollm2.png
      fewfire analyze smollm2 --methods gate,down,lowrank --plot methods.png
    """
    if densities and not methods:
        raise click.UsageError("--densities goes with --methods, which names what to measure at them")
    if methods:
        _tradeoff(model, weights, text, tokens, methods, densities or _DENSITIES, as_json, plot)
        return
    if plot:
        from fewfire.pictures import draw  # at once, so that a missing matplotlib is not told after minutes of work
    from fewfire.analyze import analyze as measured
    from fewfire.windows import windows

    sample = read_text(text) if text else _sample()
    loaded = options.load(model, weights, None, None, dense=True)
    cut = windows(loaded.tokenizer, loaded.config, sample, min(_WINDOW, loaded.context), tokens)
    with ProgressBar() as progress:
        analysis = measured(loaded.packed, cut, progress, None if dense else _calibration(loaded.packed))
    click.echo(json.dumps(analysis.to_dict(), ensure_ascii=False) if as_json else _table(analysis))
    for path in draw(analysis, plot) if plot else ():
        terminal.note(f"wrote {path}")


def _calibration(packed: Packed) -> Selection | None:
    """The calibration, if it is of use: what is measured needs none."""
    from fewfire.errors import CheckpointError
    from fewfire.selectors import store

    try:
        return store.load(packed)
    except CheckpointError as error:
        terminal.note(str(error))
        return None


def _tradeoff(
    model: str,
    weights: str,
    text: Path | None,
    tokens: int,
    methods: list[str],
    densities: list[float],
    as_json: bool,
    plot: Path | None,
) -> None:
    if plot:
        from fewfire.tradeoffpicture import draw
    from fewfire.tradeoff import check, tradeoff

    check(methods, densities, tokens)
    sample = read_text(text) if text else None
    loaded = options.load(model, weights, None, None, dense=True)
    with ProgressBar() as progress:
        found = tradeoff(loaded, methods, densities, text=sample, tokens=tokens, progress=progress)
    click.echo(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else table(found))
    for path in draw(found, plot) if plot else ():
        terminal.note(f"wrote {path}")


def _sample() -> str:
    from fewfire.calibrate import sample_text

    return sample_text()


def _table(analysis: Analysis) -> str:
    from fewfire.analyze import SHARES, SMALL

    mean = analysis.mean()
    runs = [t for t in _RUNS if t in mean.aggregated]
    if mean.predictor:
        runs = runs[::2]  # its columns need the room
    shares, together = [f"{share:.0%}" for share in SHARES], [f"t={t}" for t in runs]
    predicted = ["read", "recall", "prec."] if mean.predictor else []
    heads = ["layer", "zero", f"<{SMALL:.0%}", *shares, "kept", "never", "often", *together, *predicted]

    def cells(name: str, layer: LayerSparsity) -> list[str]:
        values = [layer.zeros, layer.small, *layer.energy, layer.kept, layer.never, layer.often]
        values += [layer.aggregated[t] for t in runs]
        if layer.predictor:
            values += [layer.predictor.density, layer.predictor.recall, layer.predictor.precision]
        return [name, *(f"{value:.1%}" for value in values)]

    rows = [heads, *(cells(str(layer.number), layer) for layer in analysis.layers), cells("mean", mean)]
    lines = ["".join(f"{cell:>7}" for cell in row) for row in rows]
    return "\n".join([*_legend(analysis, runs), "", *lines[:-1], "", lines[-1], "", *_summary(mean)])


def _legend(analysis: Analysis, runs: list[int]) -> list[str]:
    from fewfire.analyze import SHARES, SMALL

    shares, mean = ", ".join(f"{share:.0%}" for share in SHARES), analysis.mean()
    judged = "read, recall, prec.: neurons that the predictor keeps, and its recall and precision"
    return [
        f"{analysis.model}, {analysis.weights}: {len(analysis.layers)} layers of {analysis.neurons} neurons,"
        f" {analysis.tokens} tokens; h is what a neuron fires with",
        f"zero: h is exactly 0    <{SMALL:.0%}: |h| under {SMALL:.0%} of the token's largest",
        f"{shares}: neurons, largest first, that hold so much of the token's energy (sum of h^2)",
        f"active: {analysis.meaning}",
        f"kept: of a token's active neurons, those the token before had (by chance: {mean.active:.1%})",
        "never, often: active for no token, for half of them"
        + (f"    t={runs[0]} ..: for any of so many in a row" if runs else ""),
        *([judged] if mean.predictor else []),
    ]


def _summary(mean: LayerSparsity) -> list[str]:
    from fewfire.analyze import SHARES

    positions = ", ".join(f"{label}: {share:.1%}" for label, share in mean.by_position.items())
    held = ", ".join(f"{share:.0%}: {of:.1%}" for share, of in zip(SHARES, mean.output_energy, strict=True))
    return [
        f"active, by position in the window: {positions}",
        f"the energy of the output, h^2 * ||down row||^2, is held by: {held}",
    ]
