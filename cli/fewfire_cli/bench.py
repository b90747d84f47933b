"""`fewfire bench`: how fast a model runs here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from fewfire_cli import options
from fewfire_cli.human import size
from fewfire_cli.progress import ProgressBar

if TYPE_CHECKING:
    from fewfire import Model
    from fewfire.bench import Timing

_ROW = "| {:24} | {:>7} | {:>8} | {:>7} | {:20} | {:>7} | {:>20} |"
_RULE = f"| {'-' * 24} | {'-' * 6}: | {'-' * 7}: | {'-' * 6}: | {'-' * 20} | {'-' * 6}: | {'-' * 19}: |"


def _list(_: click.Context, param: click.Parameter, value: str) -> list[str]:
    return [part.strip() for part in value.split(",")]


def _numbers(_: click.Context, param: click.Parameter, value: str | None) -> list[int | None]:
    try:
        return [int(part) for part in value.split(",")] if value is not None else [None]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers like 1,2", param=param) from None


@click.command()
@click.argument("model", default=options.DEFAULT_MODEL)
@click.option("--prompt", default=512, show_default=True, help="Tokens of the prompt to read; 0: no such test.")
@click.option("--tokens", default=128, show_default=True, help="Tokens to read one by one; 0: no such test.")
@click.option("--repeat", default=5, show_default=True, help="Runs of each test.")
@click.option("--threads", callback=_numbers, help="Numbers of threads, such as 1,2.  [default: one per core]")
@click.option("--weights", callback=_list, default="q4", show_default=True, help="Number formats, such as q4,q8.")
@options.dense_option
@click.option("--json", "as_json", is_flag=True, help="Every run, as a JSON list.")
def bench(model: str, threads: list[int | None], weights: list[str], dense: bool, as_json: bool, **tests: int) -> None:
    """Speed of MODEL on this machine, in the manner of llama-bench.

    pp512 reads a prompt of 512 tokens at once, tg128 reads 128 one by one, as in generation, both of a sample text and
    from an empty context. A prompt is read with all weights; what a calibration leaves out shows in tg128, beside the
    same with --dense. Tokens per second are the median of the runs and their standard deviation.

    \b
    Example:
      fewfire bench smollm2 --weights q4,q8 --threads 1,2
      fewfire bench smollm2 --dense
    """
    results: list[dict[str, Any]] = []
    for loaded, timing in _measured(model, weights, threads, dense, tests):
        if not results and not as_json:
            click.echo(_ROW.format("model", "weights", "size", "threads", "method", "test", "tokens/s") + "\n" + _RULE)
        name, n_bytes = loaded.packed.name, sum(loaded.packed.parts().values())
        results.append(
            {
                "model": name,
                "weights": loaded.weights,
                "bytes": n_bytes,
                "threads": loaded.threads,
                "method": timing.method,
                "test": timing.test,
                "median": round(timing.median, 3),
                "deviation": round(timing.deviation, 3),
                "tokens_per_second": [round(speed, 3) for speed in timing.speeds],
            }
        )
        if not as_json:
            speed = f"{timing.median:.2f} ± {timing.deviation:.2f}"
            about = (loaded.weights, size(n_bytes), loaded.threads, timing.method, timing.test)
            click.echo(_ROW.format(name[:24], *about, speed))
    if as_json:
        click.echo(json.dumps(results))


def _measured(
    model: str, weights: list[str], threads: list[int | None], dense: bool, tests: dict[str, Any]
) -> Iterator[tuple[Model, Timing]]:
    """Every timing, as soon as it is there."""
    from fewfire.bench import bench as measure

    done = set()
    for form in weights:
        for count in threads:
            loaded = options.load(model, form, count, None, dense)
            if (loaded.weights, loaded.threads) in done:  # a packed model keeps its format, whatever is asked for
                continue
            done.add((loaded.weights, loaded.threads))
            with ProgressBar() as progress:
                timings = measure(loaded, **tests, progress=progress)
            for timing in timings:
                yield loaded, timing
