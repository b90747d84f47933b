"""Phases and chunks: each chunk is done once, by whoever comes, and a phase begins when the one before is complete."""

from __future__ import annotations

import threading
from typing import Any

import numba
import numpy as np
import pytest

from fewfire.kernels.team import DONE, advance, finish, new_team, next_phase, region_of, take, wait
from fewfire.team import Team


@numba.njit(nogil=True)
def walk(team: Any, phase: int, thread: int, chunks: Any, values: Any, done: Any, closed: Any, busy: int) -> None:
    """values[step, chunk] mixes all values of the step before, so any chunk that is early, late or doubled shows."""
    for step in range(chunks.size):
        count = chunks[step]
        chunk = take(team, phase, thread, count)
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
            chunk = take(team, phase, thread, count)
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
        walk(new_team(1), 0, 0, *expected)
        team.run(walk, *found)
        check(found, expected)


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_threads_that_come_at_any_time(threads: int, random: np.random.Generator) -> None:
    """One works alone for a while; others join in the middle, and one when all is over."""
    expected, found, team = arguments(7, 2000, 300), arguments(7, 2000, 300), new_team(threads)
    walk(new_team(1), 0, 0, *expected)

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
    takes = numba.njit(lambda a, b, c, d: take(a, b, c, d))  # pieces of kernels have no entry from Python of their own
    finishes, advances, waits = (numba.njit(lambda a, b, f=f: f(a, b)) for f in (finish, advance, wait))
    team = new_team(2)
    assert next_phase(team) == 0
    assert [takes(team, 0, 0, 4), takes(team, 1, 0, 4), takes(team, 0, 1, 4)] == [0, -1, 2]
    assert [takes(team, 0, 0, 4), takes(team, 0, 0, 4), takes(team, 0, 0, 4)] == [1, 3, -1], "then those of the other"
    assert [bool(finishes(team, 2)), bool(finishes(team, 2))] == [False, True]
    assert team[DONE] == 2
    advances(team, 0)
    assert team[DONE] == 0
    assert next_phase(team) == 1
    assert waits(team, 0) == 1, "closed already"
    assert takes(team, 0, 0, 2) == -1
    assert takes(team, 1, 0, 2) == 0


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_regions_are_where_chunks_are_taken_from(threads: int) -> None:
    takes = numba.njit(lambda a, b, c, d: take(a, b, c, d))
    regions = numba.njit(lambda a, b, c: region_of(a, b, c))
    for chunks in (1, 2, 5, 16, 33):
        for thread in range(threads):
            own = chunks * thread // threads, chunks * (thread + 1) // threads
            first = takes(new_team(threads), 0, thread, chunks)
            assert own[0] == own[1] or (first, regions(new_team(threads), first, chunks)) == (own[0], own)
        team, taken = new_team(threads), []
        while (chunk := takes(team, 0, threads - 1, chunks)) >= 0:
            taken.append(chunk)
        assert sorted(taken) == list(range(chunks))
        bounds = {regions(team, chunk, chunks) for chunk in range(chunks)}
        assert sorted(c for start, stop in bounds for c in range(start, stop)) == list(range(chunks))
