"""Ctrl-C waits for what must not be cut in half, and is not forgotten."""

from __future__ import annotations

import signal
import threading

import pytest

from fewfire.train.whole import whole


def test_it_waits() -> None:
    done = []

    def interrupted() -> None:
        with whole():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["all of it"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_errors_pass() -> None:
    with pytest.raises(ValueError, match="other"), whole():
        raise ValueError("other")


def test_other_threads_are_left_alone() -> None:
    handler = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with whole():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]
