"""The threads that run a kernel together: the caller's own and some that wait for work.

Nobody waits for the others to arrive (see `kernels/team.py`): a call returns when its work is done, even if a worker
has not woken up yet. A worker that comes late finds every phase closed and goes back to waiting.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from fewfire.kernels.team import new_team, next_phase

_Job = tuple[Callable[..., None], tuple[Any, ...], object]


def default_threads() -> int:
    """The cores that this process may use: those it is bound to, or fewer where a container has a quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))  # "max" is no number: no quota
    return cores


class Team:
    """`threads` threads that run kernels of the form `kernel(team, phase, thread, *arguments)`. One call at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._state = new_team(self.threads)
        self._unfinished: _Job | None = None
        self._queues: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in range(self.threads - 1)]
        for number, queue in enumerate(self._queues, start=1):
            threading.Thread(target=_work, args=(queue, number), name=f"fewfire-{number}", daemon=True).start()
        weakref.finalize(self, _dismiss, self._queues)

    def run(self, kernel: Callable[..., None], *arguments: Any, keep: object = None) -> None:
        """Runs the kernel on all threads; returns when its last phase is closed.

        `keep` owns the memory that addresses among the arguments point to: a late worker may still look at it. May be
        interrupted anywhere: the next call first does this thread's part of the one before.
        """
        if self._pid != os.getpid():  # a fork has the memory but not the threads
            self._start()
        if self._unfinished is not None:
            unfinished, its_arguments, _ = self._unfinished
            unfinished(*its_arguments)  # chunks that are done are not done again
        phase = next_phase(self._state)
        self._unfinished = (kernel, (self._state, phase, 0, *arguments), keep)
        for number, queue in enumerate(self._queues, start=1):
            queue.put((kernel, (self._state, phase, number, *arguments), keep))
        kernel(self._state, phase, 0, *arguments)
        self._unfinished = None


def _work(queue: SimpleQueue[_Job | None], number: int) -> None:
    while (job := _newest(queue)) is not None:
        kernel, arguments, keep = job
        kernel(*arguments)
        del job, kernel, arguments, keep  # so that an idle worker keeps no model alive


def _newest(queue: SimpleQueue[_Job | None]) -> _Job | None:
    """Waits for work; of several jobs in the queue only the last is still open."""
    job = queue.get()
    while job is not None:
        try:
            job = queue.get_nowait()
        except Empty:
            return job
    return None


def _dismiss(queues: list[SimpleQueue[_Job | None]]) -> None:
    for queue in queues:
        queue.put(None)
