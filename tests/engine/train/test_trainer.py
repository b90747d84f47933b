"""The training loop: what it computes, and that a run which was stopped anywhere goes on as if nothing had been."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fewfire.errors import FewfireError
from fewfire.train import log, lora
from fewfire.train.method import Method
from fewfire.train.network import Network
from fewfire.train.relufy import Relufy
from fewfire.train.rise import Rise
from fewfire.train.trainer import STATE, Plan, Trainer
from learning import Learned

PLAN = Plan(steps=24, rate=2e-3, batch=4, at_once=2, measured=4)


def entries(directory: Path) -> list[dict[str, Any]]:
    """The log of a run, but for how long it took."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in log.read(directory / log.NAME)]


def run(learned: Learned, directory: Path, plan: Plan = PLAN, **more: Any) -> Trainer:
    """A run with everything that has a state: low-rank updates, thresholds that move."""
    student = learned.student()
    method = Relufy(student, learned.corpus.windows, Rise(0.7, plan.steps), plan.steps)
    lora.choose(student, 4, 0)
    trainer = Trainer(student, learned.corpus, learned.teacher(), method, plan, directory, {"rank": 4}, **more)
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def unbroken(learned: Learned, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("unbroken")
    run(learned, directory)
    return entries(directory)


def test_the_log_has_every_step_and_the_measurements(unbroken: list[dict[str, Any]]) -> None:
    steps = [entry for entry in unbroken if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 25))
    assert [entry["tokens"] for entry in steps] == [4 * 32 * n for n in range(1, 25)]
    assert [entry["rate"] for entry in steps] == [PLAN.learning_rate(n) for n in range(24)]
    assert [entry["step"] for entry in unbroken if "perplexity" in entry] == [0, 6, 12, 18, 24]


def test_the_rate_by_hand() -> None:
    plan = Plan(steps=100, rate=1.0, warmup=0.1, floor=0.2)
    assert [plan.learning_rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert plan.learning_rate(10) == pytest.approx(1.0)
    assert plan.learning_rate(55) == pytest.approx(0.2 + 0.8 / 2)
    assert plan.learning_rate(99) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 89 / 90)) / 2)


def test_it_learns(learned: Learned, tmp_path: Path) -> None:
    """A student whose FFNs are disturbed comes back to its teacher."""
    student = learned.student()
    with torch.no_grad():
        for layer in student.layers:
            layer.down.weight += torch.randn(layer.down.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.2
    lora.choose(student, 0, 0)
    learned.train(student, Method(), Plan(steps=40, rate=3e-3, batch=4), tmp_path)
    found = [entry["kl"] for entry in entries(tmp_path) if "kl" in entry]
    assert sum(found[-5:]) < 0.3 * sum(found[:5])


@pytest.mark.parametrize("labels", [0.0, 0.3, 1.0])
def test_gradients_add_up_over_parts(learned: Learned, tmp_path: Path, labels: float) -> None:
    """Windows one by one move the weights as all at once do."""
    moved = []
    for at_once in (1, 4):
        student = learned.student()
        lora.choose(student, 0, 0)
        plan = Plan(steps=3, rate=1e-3, batch=4, at_once=at_once, labels=labels)
        learned.train(student, Method(), plan, tmp_path / str(at_once))
        moved.append([entry["loss"] for entry in entries(tmp_path / str(at_once)) if "loss" in entry])
    assert moved[0] == pytest.approx(moved[1], rel=2e-3, abs=2e-5)


def test_labels_alone_need_no_teacher(learned: Learned, tmp_path: Path) -> None:
    student = learned.student()
    lora.choose(student, 0, 0)
    teacher = learned.teacher()
    teacher.logits = None  # type: ignore[assignment, method-assign]
    Trainer(student, learned.corpus, teacher, Method(), Plan(2, 1e-3, labels=1.0), tmp_path, {}).run()
    first = next(entry for entry in entries(tmp_path) if "loss" in entry)
    assert first["loss"] == first["text"]
    assert first["text"] == pytest.approx(text_loss(learned, 0, 2), rel=1e-4)


def text_loss(learned: Learned, seed: int, count: int) -> float:
    """-log p of the next tokens in the first windows of the order, in plain torch."""
    ids = torch.from_numpy(learned.corpus.windows[learned.corpus.order(seed, 0)[:count]]).long()
    log_p = learned.network(ids)[:, :-1].log_softmax(-1)
    return float(-log_p.gather(-1, ids[:, 1:, None]).mean())


def test_every_window_is_seen_once_an_epoch(learned: Learned, tmp_path: Path) -> None:
    count = len(learned.corpus.windows)
    trainer = Trainer(
        learned.student().requires_grad_(True), learned.corpus, learned.teacher(), Method(),
        Plan(steps=2 * count, rate=0.0, batch=3), tmp_path, {},
    )  # fmt: skip
    seen = [window for step in range(count) for window in trainer._windows(step)]
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


class PlugPulledError(Exception):
    """What leaves no time for a checkpoint."""


@pytest.mark.parametrize(("stop", "minutes"), [(KeyboardInterrupt, 5), (PlugPulledError, 0), (PlugPulledError, 5)])
@pytest.mark.parametrize("after", [1, 6, 17])
def test_a_stopped_run_goes_on(
    learned: Learned,
    tmp_path: Path,
    unbroken: list[dict[str, Any]],
    stop: type[BaseException],
    minutes: float,
    after: int,
) -> None:
    """After Ctrl-C, from where it was; after anything else, from the last checkpoint, or from the beginning."""

    def progress(stage: str, done: int, total: int) -> None:
        if done == after:
            raise stop

    with pytest.raises(stop):
        run(learned, tmp_path, progress=progress, minutes=minutes)
    assert (tmp_path / STATE).exists() == (stop is KeyboardInterrupt or minutes == 0)
    log.append(tmp_path / log.NAME, {"step": after + 1, "what": "came after the checkpoint"})
    run(learned, tmp_path)
    assert entries(tmp_path) == unbroken


_VICTIM = """
import pickle, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_trainer import run
from learning import Learned
run(pickle.loads(Path({learned!r}).read_bytes()), Path({directory!r}), minutes=0)
"""


def test_a_killed_run_goes_on(learned: Learned, tmp_path: Path, unbroken: list[dict[str, Any]]) -> None:
    """SIGKILL at a random moment, in another process that writes checkpoints all the time."""
    import pickle

    stored, directory = tmp_path / "learned", tmp_path / "run"
    stored.write_bytes(pickle.dumps(Learned(learned.checkpoint, learned.network, learned.corpus, tmp_path)))
    paths = [str(Path(__file__).parent), *sys.path]
    script = _VICTIM.format(paths=paths, learned=str(stored), directory=str(directory))
    victim = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 300
        while not (directory / STATE).exists():
            assert victim.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.random() * 0.5)
    finally:
        victim.kill()
        victim.wait()
    run(learned, directory)
    assert entries(directory) == unbroken


def test_a_checkpoint_is_whole_or_the_one_before(
    learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run(learned, tmp_path, Plan(steps=2, rate=1e-3))
    before = (tmp_path / STATE).read_bytes()

    def half(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        trainer.save()
    assert (tmp_path / STATE).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [log.NAME, STATE]


def test_another_run_is_not_gone_on_with(learned: Learned, tmp_path: Path) -> None:
    run(learned, tmp_path, Plan(steps=2, rate=1e-3))
    with pytest.raises(ValueError, match=r"another rate \(0.001, not 0.002\)"):
        run(learned, tmp_path, Plan(steps=2, rate=2e-3))


def test_a_damaged_checkpoint_is_said_to_be_so(learned: Learned, tmp_path: Path) -> None:
    run(learned, tmp_path, Plan(steps=2, rate=1e-3))
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:1000])
    with pytest.raises(FewfireError, match="delete it to begin anew"):
        run(learned, tmp_path, Plan(steps=2, rate=1e-3))


def test_a_rate_that_is_too_high_is_said_to_be_so(learned: Learned, tmp_path: Path) -> None:
    student: Network = learned.student()
    lora.choose(student, 0, 0)
    with pytest.raises(FewfireError, match="lower learning rate"):
        learned.train(student, Method(), Plan(steps=30, rate=1e12), tmp_path)


def test_log_lines_are_json(unbroken: list[dict[str, Any]]) -> None:
    assert all(math.isfinite(v) for entry in unbroken for v in entry.values() if isinstance(v, float))
    assert json.loads(json.dumps(unbroken)) == unbroken
