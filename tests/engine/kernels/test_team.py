"""Phases and chunks: each chunk is done once, by whoever comes, and a phase begins when the one before is complete."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from fewfire.kernels.team import DONE, TICKET, advance, finish, new_team, next_phase, take, wait
from fewfire.team import Team


@numba.njit(nogil=True)
def walk(team: Any, phase: int, thread: int, chunks: Any, values: Any, done: Any, closed: Any, busy: int) -> None:
    """values[step, chunk] mixes all values of the step before, so any chunk that is early, late or doubled shows."""
    for step in range(chunks.size):
        count = chunks[step]
        chunk = take(team, phase, count)
        while chunk >= 0:
            mixed = chunk + 1
            for i in range(values.shape[1]):
                mixed = (mixed * 31 + values[step, i]) % 1000003
            for _ in range(busy * (chunk % 3)):
                mixed = (mixed * 31 + thread - thread) % 1000003
            values[step + 1, chunk] = mixed
            done[step, chunk] += 1
            if finish(team, count):
                closed[step] += values[step + 1].sum()
                advance(team, phase)
            chunk = take(team, phase, count)
        phase = wait(team, phase)


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]


def arguments(seed: int, steps: int = 300, busy: int = 20) -> Arrays:
    chunks = np.random.default_rng(seed).integers(1, 40, steps)
    return chunks, np.zeros((steps + 1, 40), np.int64), np.zeros((steps, 40), np.int64), np.zeros(steps, np.int64), busy


def check(found: Arrays, expected: Arrays) -> None:
    chunks, values, done, closed, _ = found
    np.testing.assert_array_equal(done, np.arange(40) < chunks[:, None])
    np.testing.assert_array_equal(values, expected[1])
    np.testing.assert_array_equal(closed, values[1:].sum(axis=1))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads: int, random: np.random.Generator) -> None:
    """Also more than there are cores, and the same team again and again."""
    team = Team(threads)
    for _ in range(5):
        seed = int(random.integers(1 << 30))
        expected, found = arguments(seed), arguments(seed)
        walk(new_team(), 0, 0, *expected)
        team.run(walk, *found)
        check(found, expected)


def test_threads_that_come_at_any_time(random: np.random.Generator) -> None:
    """One works alone for a while; others join in the middle, and one when all is over."""
    expected, found, team = arguments(7, 2000, 300), arguments(7, 2000, 300), new_team()
    walk(new_team(), 0, 0, *expected)

    def late(thread: int, delay: float) -> threading.Thread:
        return threading.Timer(delay, walk, (team, 0, thread, *found))

    others = [late(i, float(random.uniform(0, 0.1))) for i in range(1, 4)]
    for other in others:
        other.start()
    walk(team, 0, 0, *found)
    check(found, expected)
    for other in others:
        other.join()
    assert next_phase(team) == 2000
    walk(team, 0, 5, *found)  # finds every phase closed
    check(found, expected)


def test_chunks_are_those_of_the_open_phase() -> None:
    takes = compiled(take, 3)
    finishes, advances, waits = compiled(finish, 2), compiled(advance, 2), compiled(wait, 2)
    team = new_team()
    assert next_phase(team) == 0
    assert [takes(team, 0, 2), takes(team, 1, 2), takes(team, 0, 2), takes(team, 0, 2)] == [0, -1, 1, -1]
    assert [bool(finishes(team, 2)), bool(finishes(team, 2))] == [False, True]
    assert team[DONE] == 2
    advances(team, 0)
    assert team[DONE] == 0
    assert next_phase(team) == 1
    assert waits(team, 0) == 1, "closed already"
    assert takes(team, 0, 2) == -1
    assert takes(team, 1, 2) == 0
    assert int(team[TICKET]) & 1 == 1


def compiled(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Pieces of kernels have no entry from Python of their own."""
    if count == 2:
        return numba.njit(lambda a, b: function(a, b))
    return numba.njit(lambda a, b, c: function(a, b, c))
