"""`fewfire info`: what a model is made of."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import click

from fewfire_cli import options
from fewfire_cli.calibrate import lines
from fewfire_cli.human import count, size
from fewfire_cli.progress import ProgressBar

if TYPE_CHECKING:
    from fewfire.config import ModelConfig
    from fewfire.packed import Packed
    from fewfire.selectors.store import About

_FFN = ("gate", "up", "down", "act_threshold", "act_centre", "bypass")
_ATTENTION = ("q", "k", "v", "o", "q_norm", "k_norm")


@click.command()
@click.argument("model", default=options.DEFAULT_MODEL)
@options.weights_option
@click.option("--json", "as_json", is_flag=True, help="The same as a JSON object.")
def info(model: str, weights: str, as_json: bool) -> None:
    """Architecture, number formats and sizes of MODEL.

    Fetches the model if need be, but does not pack it: the sizes are those it has, or would have, packed.

    \b
    Example:
      fewfire info smollm2 --weights q8
    """
    from fewfire.selectors import store

    packed, chats = _open(model, weights)
    (about, unusable), on_disk = _calibration(packed), store.disk_bytes(packed)
    config, parts, parameters = packed.config, packed.parts(), _parameters(packed.config)
    if as_json:
        data = {
            "model": model,
            "path": str(packed.path),
            "weights": packed.weights,
            "chat_template": chats,
            "calibration": asdict(about) | {"disk_bytes": on_disk} if about else None,
            "parameters": parameters,
            "bytes": parts,
            "config": config.to_dict(),
        }
        click.echo(json.dumps(data, ensure_ascii=False))
        return
    described = _description(model, packed, chats)
    for number, text in enumerate(lines(about, on_disk) if about else [unusable]):
        described["calibration" if number == 0 else " " * number] = text
    for label, text in described.items():
        click.echo(f"{label:14}{text}")
    click.echo(f"\n{'part':10}{'parameters':>12}{'size':>12}{'share':>8}{'bits each':>12}")
    total = sum(parts.values())
    rows = [*parts.items(), ("all", total)]
    for part, n_bytes in rows:
        n = parameters.get(part, sum(parameters.values()))
        bits = f"{8 * n_bytes / n:.2f}" if n else "-"
        click.echo(f"{part:10}{count(n):>12}{size(n_bytes):>12}{n_bytes / total:>8.1%}{bits:>12}")


def _open(model: str, weights: str) -> tuple[Packed, bool]:
    """The packed model, or what it would be; and whether it has a chat template."""
    from fewfire import packed, sources
    from fewfire.adapter import Adapted, open_adapter
    from fewfire.checkpoint import open_checkpoint

    with ProgressBar() as progress:
        path = sources.resolve(model, progress)
    if packed.is_packed(path):
        return packed.open_packed(path), (path / packed.TEMPLATE).is_file()
    checkpoint = open_checkpoint(path)
    if adapter := sources.adapter_of(model):
        checkpoint = Adapted(checkpoint, open_adapter(adapter))
    # Sizes are all that is asked of the arrays, and a description has them as well as the arrays themselves.
    arrays = cast(Any, packed.arrays(checkpoint.config, weights))
    chats = checkpoint.chat_template() is not None
    return packed.Packed(path, path.stem, checkpoint.config, weights, arrays), chats


def _calibration(packed: Packed) -> tuple[About | None, str]:
    """What the calibration says about itself, or why there is nothing to say. A damaged one is no error here."""
    from fewfire.errors import CheckpointError
    from fewfire.packed import is_packed
    from fewfire.selectors import store

    try:
        if is_packed(packed.path) and store.is_trained(packed) and (selection := store.load(packed)):
            return None, f"none: the model was trained to choose its neurons by {selection.method}"
        return (store.about(packed) if is_packed(packed.path) else None), "none"
    except CheckpointError as error:
        return None, str(error).removeprefix(f"{packed.path}: the calibration ")


def _description(model: str, packed: Packed, chats: bool) -> dict[str, str]:
    from fewfire.packed import formats

    c = packed.config
    used = formats(c, packed.weights)
    exceptions = ", ".join(
        f"{part} {number}"
        for part, number in (("down", used.down), ("embedding and head", used.table))
        if number != packed.weights
    )
    heads = f"{c.num_attention_heads} heads of {c.head_dim}, {c.num_key_value_heads} for keys and values"
    if any(c.sliding_layers):
        heads += f", window of {c.sliding_window} on {sum(c.sliding_layers)} layers"
    return {
        "model": model,
        "path": str(packed.path),
        "architecture": c.architecture,
        "layers": f"{c.num_hidden_layers}, {c.hidden_size} wide",
        "attention": heads,
        "neurons": f"{c.intermediate_size} per layer, {c.hidden_act}{', gated' if c.gated else ''}",
        "vocabulary": f"{c.vocab_size}" + (", head tied to the embedding" if c.tie_word_embeddings else ""),
        "context": f"{c.max_position_embeddings} tokens",
        "chat template": "yes" if chats else "no",
        "format": packed.weights + (f" ({exceptions})" if exceptions else ""),
    }


def _parameters(config: ModelConfig) -> dict[str, int]:
    """Numbers of parameters in the parts that `Packed.parts` knows."""
    parts = dict.fromkeys(("embed", "attention", "ffn", "head", "norms"), 0)
    for name, shape in config.shapes().items():
        words = name.split(".")
        what = words[2] if words[0] == "layers" else words[0]
        table = {"embed": "embed", "positions": "embed", "head": "head"}
        part = "ffn" if what in _FFN else "attention" if what in _ATTENTION else table.get(what, "norms")
        parts[part] += math.prod(shape)
    return parts
