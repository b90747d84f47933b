"""Arguments and options that several commands share, and loading the model that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fewfire_cli.progress import ProgressBar

if TYPE_CHECKING:
    from fewfire import Model, Sampling

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_MODEL = "smollm2"

weights_option = click.option(
    "--weights",
    type=click.Choice(["q4", "q8", "bf16", "f32"]),
    default="q4",
    show_default=True,
    help="Number format to run the weights in.",
)

dense_option = click.option(
    "--dense", is_flag=True, help="Leave nothing out: no calibration, and neurons that a ReLU makes zero, too."
)


def model_options(f: F) -> F:
    """--weights, --threads, --context and --dense, as `load` wants them."""
    f = click.option("--context", type=int, help="Most tokens of a conversation.  [default: the model's]")(f)
    f = click.option("--threads", type=int, help="Threads to compute with.  [default: one per core]")(f)
    return weights_option(dense_option(f))


def load(source: str, weights: str, threads: int | None, context: int | None, dense: bool = False) -> Model:
    """The loaded model, with a progress bar for whatever takes a while."""
    import fewfire

    with ProgressBar() as progress:
        return fewfire.load(source, weights=weights, threads=threads, context=context, dense=dense, progress=progress)


def sampling_options(**defaults: Any) -> Callable[[F], F]:
    """The options of `Sampling`, with the defaults of one command."""

    def option(name: str, kind: type, help_text: str) -> Callable[[F], F]:
        key = name.lstrip("-").replace("-", "_")
        return click.option(name, type=kind, default=defaults.get(key), show_default=True, help=help_text)

    def decorate(f: F) -> F:
        f = option("--seed", int, "The same seed gives the same text.")(f)
        f = option("--repetition-penalty", float, "Over 1 avoids what the answer has said already.")(f)
        f = option("--min-p", float, "Keep tokens this probable relative to the best.")(f)
        f = option("--top-p", float, "Keep the most probable tokens up to this share.")(f)
        f = option("--top-k", int, "Keep this many most probable tokens; 0: all.")(f)
        return option("--temperature", float, "0 always takes the most probable token.")(f)

    return decorate


def take_sampling(options: dict[str, Any]) -> Sampling:
    """Removes the sampling options from a command's options and makes a `Sampling` of them."""
    from fewfire import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Sampling(**{name: options.pop(name) for name in names})
