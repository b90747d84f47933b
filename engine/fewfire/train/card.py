"""The model card of a trained model: a README.md as the Hugging Face hub has it, written out of the run's own log.

Promises that nothing in it tells whose machine it was: texts and models go by their names, without their directories.
Knows nothing of networks and of how a run works.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewfire import hub
from fewfire.pack import model_name
from fewfire.sources import ALIASES
from fewfire.train import log
from fewfire.train.log import Entries

NAME = "README.md"
_LICENSE = re.compile(r"\A---\n(?:(?!---$).*\n)*?license: *[\"']?([\w.-]+)[\"']? *\n", re.MULTILINE)
_HOW = {
    "threshold": "An activation keeps its value where that is large, and is exactly zero elsewhere (CATS, 2404.08763):"
    " over a threshold for each neuron",
    "centred": "act(gate) is measured from the value near which the neuron idles, and is exactly zero within a"
    " threshold of that; what idling neurons give is a matrix of its own, which every token reads",
    "relu": "ReLU took the place of the FFN's activation (ReLU Strikes Back, 2310.04564).",
    "shifted": "ReLU(x - b) took the place of the FFN's activation (ReLU Strikes Back, 2310.04564).",
    "topk": "A token keeps the k neurons of a layer with the largest abs(act(gate)) (The Lazy Neuron Phenomenon,"
    " 2210.06313).",
    "lte": "Neurons are in groups of 32, and routers that were trained with the model say which groups a token needs"
    " (Learn To be Efficient, 2402.06126).",
    "plain": "Nothing but the training: activations are the original's, so that other methods can be compared with it.",
}


@dataclass(frozen=True)
class Text:
    """A file that was trained on or measured with."""

    name: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> Text:
        """A file on disk."""
        return cls(path.name, path.stat().st_size)

    def __str__(self) -> str:
        return f"{self.name} ({self.bytes:,} bytes)"


@dataclass(frozen=True)
class Base:
    """The original: what to call it, its id on the hub and its licence there as far as they are known."""

    name: str
    hub_id: str = ""
    license: str = ""

    @classmethod
    def of(cls, source: str, path: Path) -> Base:
        """source: what the user named; path: where that is."""
        if Path(source).expanduser().exists():
            return cls(model_name(Path(source).expanduser()), "", _license(path))
        if source in ALIASES:
            return cls(source, ALIASES[source].hub_id, ALIASES[source].license)
        named = hub.parse(source)
        return cls(source, named[0] if named else "", _license(path))


def _license(path: Path) -> str:
    """What the card next to a checkpoint says, empty if there is none."""
    card = path / NAME
    found = _LICENSE.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    return found[1] if found else ""


@dataclass(frozen=True)
class Made:
    """What a run was asked to make."""

    name: str  # of the result's directory
    method: str
    base: Base
    options: Mapping[str, Any]  # those of the command line that are not the defaults
    texts: Sequence[Text]
    held_out: Text | None
    before: str = ""  # what an earlier training, which it goes on from, has spent

    @property
    def command(self) -> str:
        """The command that was given, files by their names."""
        words = ["fewfire", "train", self.method, self.base.name, self.name]
        for text in self.texts:
            words += ["--text", text.name]
        words += ["--heldout", self.held_out.name] if self.held_out else []
        for option, value in self.options.items():
            words += [f"--{option}"] if value is True else [f"--{option}", str(value)]
        return shlex.join(words)


def write(made: Made, entries: Entries, adapter: str | None) -> str:
    """The card's text.

    entries: of the run's log; adapter: the name of the file that has the update by itself, if there is one.
    """
    method, base, options, held_out = made.method, made.base, made.options, made.held_out
    steps, measured = log.steps(entries), log.measurements(entries)
    last, original = measured[-1], measured[0]["original"]
    kind = options.get("activation", "threshold") if method == "relufy" else method
    how = _HOW[kind]
    if kind in ("threshold", "centred"):
        how += "." if {"reconstruct", "start"} & set(options) else ", which rose while the model adapted."
    if "reconstruct" in options:
        how += (
            " Down projections began as least squares over text of the same files, so as to make up for what is left"
            " out; tokens and hours are those of the training that followed."
        )
    if "start" in options:
        spent = made.before or "an unknown number of tokens"
        how += f" It went on from {options['start']}, on which an earlier training had spent {spent}."
    if options.get("stage") == 2:
        how += " ReLUs come after the norms as well."
    share = options.get("labels", 0.0)
    learnt = "the text's next tokens" if share == 1 else f"the predictions of {base.name} on the text"
    learnt += f", and {share:.0%} the text's own next tokens" if 0 < share < 1 else ""
    of = str(held_out) if held_out else "a part of the same text that was kept apart"
    sections = [
        _front(method, base),
        f"# {made.name}",
        f"{base.name}, trained with `fewfire train {method}`: {last['zeros']:.1%} of its FFN neurons are exactly zero"
        f" for a token, and its perplexity on held-out text is {last['perplexity']:.2f}, that of {base.name}"
        f" {original:.2f} ({last['perplexity'] / original - 1:+.1%}). {how}",
        "## How to run it",
        _usage(made.name, base, adapter, "adapter" in options),
        "## How it was made",
        f"```sh\n{made.command}\n```",
        f"{steps[-1]['tokens']:,} tokens in {steps[-1]['seconds'] / 3600:.2f} hours of training, of"
        f" {', '.join(map(str, made.texts))}. It learnt from {learnt}.",
        "## What came out",
        f"Zeros of act(gate) and perplexity on {of}, while it was training:",
        _course(steps, measured, original),
        "Zeros by layer, from the first, in the end: " + ", ".join(f"{share:.0%}" for share in last["layers"]) + ".",
        "## Limits",
        _limits(method, base, held_out),
    ]
    return "\n\n".join(sections) + "\n"


def _front(method: str, base: Base) -> str:
    """The YAML that the hub reads."""
    lines = [f"base_model: {base.hub_id}", "base_model_relation: finetune"] if base.hub_id else []
    lines += [f"license: {base.license}"] if base.license else []
    lines += ["library_name: fewfire", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in ("fewfire", "sparse", method)), "---"])


def _usage(name: str, base: Base, adapter: str | None, rounded: bool) -> str:
    packed = shlex.quote(f"{name}-q4")
    text = f"```sh\nfewfire pack {shlex.quote(name)} {packed}\nfewfire chat {packed}\n```"
    if adapter:
        again = f"fewfire pack {shlex.quote(base.name)} {packed} --adapter {adapter}"
        near = "is near to it, its updates being rounded (the figures here are not its own)"
        text += (
            f"\n\nThe small file {adapter} alone, with {base.name}, {near if rounded else 'gives the same'}: `{again}`."
        )
    return text


def _course(steps: Entries, measured: Entries, original: float) -> str:
    tokens = {0: 0} | {entry["step"]: entry["tokens"] for entry in steps}
    rows = [f"| original | | {original:.2f} | |"]
    rows += [
        f"| {tokens[e['step']]:,} | {e['zeros']:.1%} | {e['perplexity']:.2f} | {e['perplexity'] / original - 1:+.1%} |"
        for e in measured
    ]
    return "\n".join(["| tokens | zeros | perplexity | growth |", "| ---: | ---: | ---: | ---: |", *rows])


def _limits(method: str, base: Base, held_out: Text | None) -> str:
    limits = []
    if method != "plain":
        limits += [
            f"It is no better than {base.name} at anything but speed, and what that gets wrong it gets wrong as well.",
            "Generated tokens gain speed, prompts do not: between them the tokens of a prompt need nearly all neurons.",
            "Other programs may not know its activations or its choice of neurons, and then compute another model.",
        ]
    if held_out is None:
        limits.append(
            "The held-out text is of the kind that it was trained on, which it has come to know better by that alone;"
            " on others perplexity may have grown more."
        )
    else:
        limits.append("Perplexity was measured on one text; on others it may have grown more.")
    return "\n".join(textwrap.fill(f"- {limit}", 118, subsequent_indent="  ") for limit in limits)
