"""`fewfire calibrate`: chooses what a model leaves out, from sample text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fewfire_cli import options
from fewfire_cli.human import size
from fewfire_cli.progress import ProgressBar
from fewfire_cli.text import read_text

if TYPE_CHECKING:
    from fewfire.selectors.store import About


def _share(_: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """`0.5` or `50%`."""
    if value is None:
        return None
    number, percent = value.strip().removesuffix("%"), value.strip().endswith("%")
    try:
        return float(number) / (100 if percent else 1)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a share like 0.5 nor one like 50%", param=param) from None


def _budget(context: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """`1%`, and not `1`, which might mean either."""
    if value is not None and not value.strip().endswith("%"):
        raise click.BadParameter(f"{value!r} has no percent sign: write it like 1%", param=param)
    return _share(context, param, value)


@click.command()
@click.argument("model", default=options.DEFAULT_MODEL)
@options.weights_option
@click.option("--threads", type=int, help="Threads to compute with.  [default: one per core]")
@click.option("--method", help="What decides, see below; several are joined with +.  [default: the fastest]")
@click.option("--density", callback=_share, help="Share to read of the rows that the method may leave out, like 0.5.")
@click.option("--budget", callback=_budget, help="Growth of perplexity to allow, like 1%.")
@click.option("--text", type=click.Path(path_type=Path), help="Sample text.  [default: what smollm2 says, and prose]")
@click.option("--remove", is_flag=True, help="Remove the calibration of MODEL, and make none.")
@click.option("--json", "as_json", is_flag=True, help="The result as a JSON object.")
def calibrate(
    model: str,
    weights: str,
    threads: int | None,
    method: str | None,
    density: float | None,
    budget: float | None,
    text: Path | None,
    remove: bool,
    as_json: bool,
) -> None:
    """Chooses which weights MODEL leaves out, so that a token reads fewer of them.

    Either --density says how much is read, with a --method, or --budget how much worse the predictions may get; then
    the fastest of the usual methods is taken unless one is named. The result is kept with the packed model and used
    from then on by every command; --dense does without it. If it is interrupted, the same command goes on where it
    stopped.

    \b
    Methods, several of which can be joined with +:
      gate       neurons with a large |act(gate)| alone read up and down (CATS)
      topk       so many neurons a layer do, where it is largest (Lazy Neuron)
      down       neurons with a large |act(gate) * up| alone read down (TEAL)
      lowrank    neurons that a low-rank predictor chooses (Deja Vu)
      router     groups of neurons that a router chooses (LTE)
      magnitude  large inputs of all projections (TEAL)
      qkv, o     large inputs of these projections alone
      screen     exact logits of tokens that are probable in a head of few bits
      reuse-8    what 8 tokens in a row have read stays read (ReLU Strikes Back)
    ReLU models leave out what is exactly zero without a calibration.

    \b
    Example:
      fewfire calibrate smollm2 --budget 1%
      fewfire calibrate smollm2 --method gate --density 0.5 --text book.txt
      fewfire calibrate smollm2 --remove
    """
    from fewfire.calibrate import calibrate, check
    from fewfire.selectors import store

    if remove:
        if any(each is not None for each in (method, density, budget, text)):
            raise click.UsageError("--remove goes alone: it makes no new calibration")
        _remove(model, weights, as_json)
        return
    check(method, density, budget)
    content = read_text(text) if text else None
    loaded = options.load(model, weights, threads, None, dense=True)
    with ProgressBar() as progress:
        result = calibrate(loaded, method=method, density=density, budget=budget, text=content, progress=progress)
    if as_json:
        click.echo(json.dumps(asdict(result) | {"disk_bytes": store.disk_bytes(loaded.packed)}))
        return
    for line in lines(result, store.disk_bytes(loaded.packed)):
        click.echo(line)


def _remove(model: str, weights: str, as_json: bool) -> None:
    from fewfire.selectors import store

    packed = options.load(model, weights, None, None, dense=True).packed
    freed = store.remove(packed)
    if as_json:
        click.echo(json.dumps({"removed_bytes": freed}))
    else:
        click.echo(f"removed the calibration of {packed.path} ({size(freed)})" if freed else "there is no calibration")


def lines(about: About, disk_bytes: int) -> list[str]:
    """What a calibration is and costs, for people."""
    kept = "; ".join(_kept(kind, shares) for kind, shares in about.densities.items())
    missed = f"; the head misses the likeliest in at most {about.missed:.1%}" if about.missed is not None else ""
    return [
        f"method {about.method}, density {about.density:.2f}: {kept}",
        f"perplexity {about.growth:+.2%} ± {about.growth_error:.2%}, KL to dense {about.kl:.4f} nats,"
        f" same likeliest token {about.agreement:.1%}, over {about.tokens} tokens{missed}",
        f"{size(about.bytes_per_token)} of weights a token instead of {size(about.dense_bytes_per_token)},"
        f" {about.speedup:.2f} times as fast as dense; {size(disk_bytes)} on disk",
    ]


def _kept(kind: str, shares: Sequence[float]) -> str:
    """What a part keeps, and from which layer to which that reaches."""
    mean, low, high = sum(shares) / len(shares), min(shares), max(shares)
    return f"{kind} {mean:.3g}" + (f" ({low:.2g} to {high:.2g})" if low < high else "")
