"""Trained models beside their original, from end to end, on tiny models: what is counted, resumed and reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewfire
import tiny
from commandline import run
from fewfire import adapter, reference, sources
from fewfire.checkpoint import open_checkpoint
from fewfire.sources import AdaptedModel
from perf import judge, machine, report, results, trained

STEPS = [{"step": 1, "loss": 2.0, "tokens": 512, "seconds": 7200.0}, {"step": 1, "perplexity": 9.0, "zeros": 0.6}]

RATE = {"median": 1.0, "min": 1.0, "max": 1.0}


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    for name, text in (("a.txt", tiny.PARAGRAPH * 4), ("b.txt", "Somebody else wrote about the boat. " * 20)):
        (tmp_path / name).write_text(text)
    return [f"{tmp_path / 'a.txt'}@0.5:1.0", str(tmp_path / "b.txt")]


@pytest.fixture
def command(
    tmp_path: Path, texts: list[str], tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Runs `perf.trained` with options, and returns its result."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(judge, "_WINDOW", 48)
    monkeypatch.setattr(machine, "_commit", lambda: "abc")

    def call(*options: object) -> dict[str, Any]:
        small = ["--tokens", 90, "--threads", 1, "--rounds", 1, "--weights", "f32", "--peers"]
        trained.main([str(each) for each in ("--against", tiny_path("llama"), "--texts", *texts, *small, *options)])
        return json.loads((tmp_path / "results" / "trained.json").read_text())

    return call


@pytest.fixture
def sparser(tiny_path: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny model with thresholds, as if it had been trained."""
    path = tmp_path / "sparser"
    shutil.copytree(tiny_path("llama-fatsilu"), path)
    (path / "training").mkdir()
    (path / "training" / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in STEPS))
    return path


def calibrate(directory: Path, source: Path, method: str) -> Path:
    """The tiny model with half of what a method leaves out read."""
    path, sample = directory / method, directory / "sample.txt"
    sample.write_text(tiny.PARAGRAPH * 8)
    assert run("pack", source, path, "--weights", "f32").code == 0
    assert run("calibrate", path, "--method", method, "--density", 0.5, "--text", sample).code == 0
    return path


def test_from_models_to_the_readme(
    command: Callable[..., dict[str, Any]], sparser: Path, tiny_path: Callable[[str], Path], tmp_path: Path
) -> None:
    gate = calibrate(tmp_path, tiny_path("llama"), "gate")
    models = [f"relufy={sparser}", f"gate={gate}", f"same={tiny_path('llama')}"]
    found = command("--models", *models, "--curve", models[0], "--factors", 0, 1)
    assert [text["label"] for text in found["texts"]] == ["a.txt (0.5:1.0)", "b.txt"]
    relufy, calibrated, same = found["rows"]
    assert [row["method"] for row in found["rows"]] == ["exact", "gate", "dense"]
    assert (relufy["tokens"], relufy["hours"]) == (512, 2.0)
    assert "tokens" not in calibrated
    assert same["rows_read"] == {"gate": 1.0, "up": 1.0, "down": 1.0}
    for text, original in zip(same["texts"], found["texts"], strict=True):
        assert text["kl"] == text["growth_percent"] == 0.0
        assert text["agreement"] == 1.0
        assert text["perplexity"] == original["perplexity"]
    for row in (relufy, calibrated):
        assert 0.1 < row["rows_read"]["up"] == row["rows_read"]["down"] < 0.9
        assert row["rows_read"]["gate"] == 1.0
        assert row["megabytes_per_token"] < same["megabytes_per_token"]
        assert all(text["kl"] > 0 for text in row["texts"])
    assert [(s["name"], s["threads"]) for s in found["speeds"]] == [
        ("llama", 1), ("relufy", 1), ("gate", 1), ("same", 1)
    ]  # fmt: skip
    assert found["speeds"][0]["over_dense"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    lowest, whole = found["curve"]["points"]
    assert all(whole[key] == relufy[key] for key in ("rows_read", "texts"))
    assert trained.left_out(lowest) == 0.0
    assert str(tmp_path) not in json.dumps(found)
    section = report.figures({"trained": found})
    assert "### Models that fire less, llama, f32" in section
    assert "| relufy | " in section
    assert "relufy with its thresholds higher and lower" in section


def test_what_columns_leave_out_is_not_taken_for_neurons(
    command: Callable[..., dict[str, Any]], tiny_path: Callable[[str], Path], tmp_path: Path
) -> None:
    """They read no up row by itself, and the whole of it would look as if all neurons were left out."""
    made = [f"{method}={calibrate(tmp_path, tiny_path('llama'), method)}" for method in ("magnitude", "down", "qkv")]
    found = command("--models", *made, "--rounds", 0)
    magnitude, down, qkv = found["rows"]
    assert magnitude["rows_read"]["up"] == 0.0
    assert 0.1 < trained.left_out(magnitude) < 0.9
    assert down["rows_read"]["up"] == 1.0
    assert 0.1 < trained.left_out(down) < 0.9
    assert trained.left_out(qkv) == 0.0
    header, _, _, *rows = (line.split("|") for line in trained.rows_table(found).splitlines())
    shares = [row[[cell.strip() for cell in header].index("neurons left out")].strip() for row in rows]
    assert shares == [f"{trained.left_out(row):.1%}" for row in found["rows"]]


def test_a_result_goes_on_with_another_model(
    command: Callable[..., dict[str, Any]], sparser: Path, tiny_path: Callable[[str], Path]
) -> None:
    first = command("--models", f"a={sparser}")
    again = command("--models", f"a={sparser}", f"b={tiny_path('llama')}", "--resume")
    assert again["rows"][0] == first["rows"][0]
    assert [row["name"] for row in again["rows"]] == ["a", "b"]
    assert {speed["name"] for speed in again["speeds"]} == {"llama", "a", "b"}


def test_what_is_there_is_not_measured_again(
    command: Callable[..., dict[str, Any]], sparser: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = command("--models", f"a={sparser}")
    monkeypatch.setattr(judge.Judge, "row", lambda *_: pytest.fail("judged again"))
    monkeypatch.setattr(trained, "race", lambda *_: pytest.fail("timed again"))
    assert command("--models", f"a={sparser}", "--resume") == first


def test_what_another_engine_measured_is_measured_again(
    command: Callable[..., dict[str, Any]], sparser: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("--models", f"a={sparser}")
    monkeypatch.setattr(machine, "_commit", lambda: "def")
    monkeypatch.setattr(judge.Judge, "row", lambda *_: pytest.fail("judged again"))
    with pytest.raises(pytest.fail.Exception, match="judged again"):
        command("--models", f"a={sparser}", "--resume")


def test_a_curve_goes_on_with_other_factors(command: Callable[..., dict[str, Any]], sparser: Path) -> None:
    curve = command("--curve", f"a={sparser}", "--factors", 1, "--resume")["curve"]
    more = command("--curve", f"a={sparser}", "--factors", 0.5, "--resume")["curve"]
    assert [point["factor"] for point in more["points"]] == [0.5, 1.0]
    assert more["points"][1] == curve["points"][0]


@pytest.mark.parametrize("change", ["threads", "rounds", "peers", "cpu", "library"])
def test_speeds_measured_otherwise_are_measured_anew(
    command: Callable[..., dict[str, Any]], sparser: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    first = command("--models", f"a={sparser}")
    described = machine.describe()
    other = {
        "cpu": described | {"cpu": "another"},
        "library": described | {"versions": described["versions"] | {"numba": "another"}},
    }
    monkeypatch.setattr(machine, "describe", lambda: other.get(change, described))
    monkeypatch.setattr(judge.Judge, "row", lambda *_: pytest.fail("judged again"))
    speeds = [{"name": name, "threads": 1, "over_dense": RATE, "tokens_per_second": RATE} for name in ("llama", "a")]
    monkeypatch.setattr(trained, "race", lambda *_: (speeds, {}))
    options = {"threads": ["--threads", 2], "rounds": ["--rounds", 2], "peers": ["--peers", "llama.cpp:Q8_0"]}
    again = command("--models", f"a={sparser}", "--resume", *options.get(change, []))
    assert again["rows"] == first["rows"]
    assert again["speeds"] == speeds
    monkeypatch.setattr(trained, "race", lambda *_: pytest.fail("timed again"))
    assert command("--models", f"a={sparser}", "--resume", *options.get(change, [])) == again


def test_speeds_of_another_cpu_go_where_none_are_asked_for(
    command: Callable[..., dict[str, Any]], sparser: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = command("--models", f"a={sparser}")
    assert command("--models", f"a={sparser}", "--resume", "--rounds", 0) == first
    other = machine.describe() | {"cpu": "another"}
    monkeypatch.setattr(machine, "describe", lambda: other)
    again = command("--models", f"a={sparser}", "--resume", "--rounds", 0)
    assert (again["speeds"], again["rows"]) == ([], first["rows"])


def test_a_model_that_has_changed_is_timed_even_after_an_interruption(
    command: Callable[..., dict[str, Any]],
    sparser: Path,
    tiny_path: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command("--models", f"a={sparser}")
    own = trained.race
    monkeypatch.setattr(trained, "race", lambda *_: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception, match="interrupted"):
        command("--models", f"a={tiny_path('llama')}", "--resume")
    timed = []
    monkeypatch.setattr(trained, "race", lambda *each: timed.append(each) or own(*each))
    command("--models", f"a={tiny_path('llama')}", "--resume")
    assert len(timed) == 1


def test_neurons_are_counted_as_numpy_does(
    sparser: Path, texts: list[str], tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of act(gate) that is zero, from the reference's own values."""
    judging = judge.Judge(str(tiny_path("llama")), "f32", 1, texts, 40)
    share = trained.left_out(judging.row(judging.open(str(sparser))))
    opened = open_checkpoint(sparser)
    tensors = {name: opened.read(name) for name in opened.config.shapes()}
    seen: list[np.ndarray] = []
    own = reference.activate

    def noted(*args: Any) -> np.ndarray:
        seen.append(own(*args))
        return seen[-1]

    monkeypatch.setattr(reference, "activate", noted)
    for text in judging.texts:
        for window in text.windows:
            reference.forward(opened.config, tensors, window[:-1])
    assert share == pytest.approx(float(np.mean(np.concatenate(seen) == 0)), abs=2e-3)


def test_thresholds_are_scaled(sparser: Path, tiny_path: Callable[[str], Path]) -> None:
    model = fewfire.load(sparser, weights="f32", threads=1)
    before = model.packed.arrays["act_threshold"]
    double = trained.scaled(model, 2.0)
    np.testing.assert_allclose(double.packed.arrays["act_threshold"], 2 * before)
    assert np.abs(double.logits(tiny.prompt(20)) - model.logits(tiny.prompt(20))).max() > 0.01
    same = trained.scaled(model, 1.0).logits(tiny.prompt(20))
    np.testing.assert_array_equal(same, model.logits(tiny.prompt(20)))
    with pytest.raises(ValueError, match="no thresholds"):
        trained.scaled(fewfire.load(tiny_path("llama"), weights="f32", threads=1), 2.0)


def test_what_training_took(
    sparser: Path, tiny_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained.training(str(sparser)) == {"tokens": 512, "hours": 2.0}
    assert trained.training(str(tiny_path("llama"))) == {}
    path, base = tmp_path / "a.safetensors", open_checkpoint(tiny_path("llama"))
    norm = {"layers.0.ffn_norm.weight": np.ones(64, np.float32)}
    adapter.save(path, base, norm, base="tiny", method="m", config={}, about={"tokens": 7, "seed": 1})
    monkeypatch.setattr(sources, "ADAPTED", {"tiny-relu": AdaptedModel("tiny-relu", "a test", "smollm2", str(path))})
    assert trained.training("tiny-relu") == {"tokens": 7}


def test_models_that_cannot_be_compared(texts: list[str], tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    judging = judge.Judge(str(tiny_path("llama")), "f32", 1, texts, 40)
    packed = tmp_path / "packed"
    assert run("pack", tiny_path("llama"), packed, "--weights", "q8").code == 0
    with pytest.raises(ValueError, match="packed as q8, not f32"):
        judging.open(str(packed))
    other = tmp_path / "other"
    shutil.copytree(tiny_path("llama"), other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(
        json.dumps(settings | {"add_bos_token": True, "bos_token": "<|im_end|>"})
    )
    with pytest.raises(ValueError, match="other tokens"):
        judging.open(str(other))


def test_names() -> None:
    assert trained.named("a=some/dir") == ("a", "some/dir")
    assert trained.named("some/dir") == ("dir", "some/dir")
    assert trained.named("smollm2-relu") == ("smollm2-relu", "smollm2-relu")
