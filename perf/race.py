"""Decode speeds of an original, of models made from it and of peers: in turn, over the same tokens of real text.

What they decode is given, and not what each would say: a model that goes round in circles reads the same few neurons
all the time. Every round takes another window, and the order turns round from round to round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from perf import machine
from perf.judge import Judge
from perf.peers import Fewfire, Request, Stepwise, load_all
from perf.spread import pairwise, spread
from perf.status import say

_TOKENS = 64  # of a turn, at most; they come after the first half of a window


def race(
    judge: Judge, models: Sequence[tuple[str, str]], peers: Sequence[str], requests: Sequence[Request], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Speeds of the original (dense), of the models (name, source) and of the original in peers, and who is absent.

    requests: for the original, one for each number of threads. Times are those of the original with as many threads,
    round by round.
    """
    form = judge.model.weights
    originals = [Fewfire(request.label(), f"{form}-dense", request) for request in requests]
    made = [
        Fewfire(name, form, Request(source, request.threads, request.context))
        for name, source in models
        for request in requests
    ]
    loaded, absent = load_all(peers, requests)
    contenders = [*originals, *made, *(each for each in loaded if isinstance(each, Stepwise))]
    texts = [window for text in judge.texts for window in text.windows]
    longest = max(map(len, texts))
    samples = _samples(contenders, [window for window in texts if len(window) == longest], rounds)
    base = {each.threads: found for each, found in zip(originals, samples, strict=False)}
    return [
        {
            "name": contender.name,
            "threads": contender.threads,
            "tokens_per_second": spread([1 / each for each in found]),
            "over_dense": pairwise(base[contender.threads], found),
        }
        for contender, found in zip(contenders, samples, strict=True)
    ], absent


def _samples(contenders: Sequence[Stepwise], windows: Sequence[list[int]], rounds: int) -> list[list[float]]:
    """Seconds per token of each contender in each round, after one that does not count."""
    samples: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds + 1):
        window = windows[number % len(windows)]
        order = range(len(contenders)) if number % 2 else reversed(range(len(contenders)))
        for i in order:
            say(f"round {number} of {rounds}: {contenders[i].name}, {contenders[i].threads} threads")
            machine.settle()
            seconds = _seconds(contenders[i], window)
            if number:
                samples[i].append(seconds)
    say("")
    return samples


def _seconds(contender: Stepwise, window: list[int]) -> float:
    """Per token, after the first half of a window."""
    half = len(window) // 2
    tokens = window[half : half + _TOKENS]
    contender.reset()
    contender.feed(window[:half])
    start = time.perf_counter()
    for token in tokens:
        contender.feed([token])
    return (time.perf_counter() - start) / len(tokens)
