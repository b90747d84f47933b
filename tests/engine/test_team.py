"""The threads themselves: they come, they work, they go, and an interruption leaves nothing half done."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fewfire.team import Team, default_threads

State = np.ndarray


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fewfire-")]


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for what another thread is about to do."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited for five seconds")


@pytest.fixture(autouse=True)
def _no_teams_of_other_tests() -> None:
    gc.collect()
    eventually(lambda: not workers())


def test_threads_begin_and_end_with_their_team() -> None:
    team = Team(4)
    assert [t.name for t in workers()] == ["fewfire-1", "fewfire-2", "fewfire-3"]
    assert all(t.daemon for t in workers())
    assert team.threads == 4
    del team
    gc.collect()
    eventually(lambda: not workers())
    Team(1)
    assert not workers()


def test_every_thread_gets_the_call() -> None:
    calls, team = [], Team(3)

    def kernel(state: State, phase: int, thread: int, *arguments: Any) -> None:
        calls.append((phase, thread, arguments))

    team.run(kernel, "a", 2)
    assert (0, 0, ("a", 2)) in calls, "the caller's own part is done when the call returns"
    eventually(lambda: len(calls) == 3)
    assert sorted(calls) == [(0, i, ("a", 2)) for i in range(3)]


def test_late_workers_skip_what_is_over() -> None:
    """A worker that is kept busy misses calls, and then gets only the last one."""
    calls, gate, team = [], threading.Event(), Team(2)

    def kernel(state: State, phase: int, thread: int, call: int) -> None:
        if thread == 1:
            calls.append(call)
            gate.wait(5)

    team.run(kernel, 0)
    eventually(lambda: calls == [0])
    for call in range(1, 5):
        team.run(kernel, call)
    gate.set()
    eventually(lambda: calls == [0, 4])


def test_memory_is_kept_for_late_workers_and_then_let_go() -> None:
    class Owner:
        pass

    started, gate, team, owner = threading.Event(), threading.Event(), Team(2), Owner()

    def kernel(state: State, phase: int, thread: int) -> None:
        if thread == 1:
            started.set()
            gate.wait(5)

    team.run(kernel, keep=owner)
    started.wait(5)
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is not None
    gate.set()
    eventually(lambda: alive() is None)


@pytest.mark.parametrize("where", ["put", "kernel"])
def test_an_interrupted_call_is_finished_by_the_next(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the workers would be in the middle of its phases when that begins."""
    calls, team = [], Team(1)

    def kernel(state: State, phase: int, thread: int, call: int) -> None:
        calls.append(call)
        if call == 1 and where == "kernel" and calls.count(1) == 1:
            raise KeyboardInterrupt

    class Interrupted:
        def put(self, job: object) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "put":
            patch.setattr(team, "_queues", [Interrupted()])
        with pytest.raises(KeyboardInterrupt):
            team.run(kernel, 1)
    team.run(kernel, 2)
    assert calls == ([1, 2] if where == "put" else [1, 1, 2])
    team.run(kernel, 3)
    assert calls[-1] == 3
    assert calls.count(1) <= 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_gets_workers_of_its_own() -> None:
    code = """
import os, threading, time
from fewfire.team import Team
seen, team = set(), Team(2)
def kernel(state, phase, thread):
    seen.add(thread)
team.run(kernel)
if pid := os.fork():
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
seen.clear()
team.run(kernel)
while seen != {0, 1}:
    time.sleep(0.01)
os._exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 7


def test_default_threads() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(before)})
            assert default_threads() == 1
        finally:
            os.sched_setaffinity(0, before)
