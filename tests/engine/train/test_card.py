"""Model cards: what they say of a run, and that a run leaves one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from fewfire.adapter import open_adapter
from fewfire.train import card, log
from fewfire.train.card import Base, Made, Text
from fewfire.train.run import RECIPES, TRAINING, Options, train

LOG: list[dict[str, Any]] = [
    {"step": 0, "perplexity": 62.0, "zeros": 0.5, "layers": [0.4, 0.6], "original": 25.0},
    {"step": 1, "loss": 2.0, "tokens": 1024, "seconds": 30.0},
    {"step": 2, "loss": 1.0, "tokens": 2048, "seconds": 5400.0},
    {"step": 2, "perplexity": 26.0, "zeros": 0.8049, "layers": [0.75, 0.86], "original": 25.0},
]
BASE = Base("smollm2", "Somebody/SmolLM2", "apache-2.0")
TEXTS = [Text("book.txt", 123_456), Text("my notes.txt", 7)]


def written(method: str = "relufy", options: dict[str, Any] | None = None, **more: Any) -> str:
    adapter = more.pop("adapter", None)
    settings: dict[str, Any] = {"base": BASE, "texts": TEXTS, "held_out": None}
    return card.write(Made("sparser", method, options=options or {}, **settings | more), LOG, adapter)


def front(text: str) -> dict[str, Any]:
    """The YAML that a card begins with."""
    return yaml.safe_load(text.split("---\n")[1])


def test_what_the_hub_reads() -> None:
    assert front(written()) == {
        "base_model": "Somebody/SmolLM2", "base_model_relation": "finetune", "license": "apache-2.0",
        "library_name": "fewfire", "pipeline_tag": "text-generation", "tags": ["fewfire", "sparse", "relufy"],
    }  # fmt: skip
    unknown = front(written(base=Base("mine")))
    assert not {"base_model", "license"} & set(unknown)


def test_figures_of_the_log() -> None:
    text = written()
    for words in (
        "80.5% of its FFN neurons", "is 26.00, that of smollm2 25.00 (+4.0%)", "2,048 tokens in 1.50 hours",
        "book.txt (123,456 bytes)", "| 0 | 50.0% | 62.00 | +148.0% |", "| 2,048 | 80.5% | 26.00 | +4.0% |",
        "in the end: 75%, 86%.", "a part of the same text",
    ):  # fmt: skip
        assert words in text
    assert "next tokens" not in text


def test_the_command_can_be_given_again() -> None:
    options = Options(tokens=2048, sparsity=0.8, uniform=True).chosen()
    line = Made("sparser", "relufy", BASE, options, TEXTS, Text("other.txt", 9)).command
    assert line == (
        "fewfire train relufy smollm2 sparser --text book.txt --text 'my notes.txt' --heldout other.txt --tokens 2048"
        " --sparsity 0.8 --uniform"
    )
    assert f"```sh\n{line}\n```" in written(options=options, held_out=Text("other.txt", 9))


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"activation": "shifted", "stage": 2}])
def test_how_relufy_works_depends_on_its_options(options: dict[str, Any]) -> None:
    text = written(options=options)
    assert ("CATS" in text) == ("activation" not in options)
    assert ("x - b" in text) == (options.get("activation") == "shifted")
    assert ("norms as well" in text) == ("stage" in options)


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_has_a_card(method: str) -> None:
    assert f"`fewfire train {method}`" in written(method)
    assert ("gain speed" in written(method)) == (method != "plain")


def test_what_it_learnt_from() -> None:
    assert "from the predictions of smollm2 on the text." in written()
    assert "and 25% the text's own next tokens" in written(options={"labels": 0.25})
    assert "It learnt from the text's next tokens." in written(options={"labels": 1.0})


def test_how_down_began() -> None:
    assert "rose while" in written()
    assert "least squares" not in written()
    fitted = written(options={"reconstruct": True})
    assert "least squares" in fitted
    assert "rose while" not in fitted
    assert "thresholds" not in written(options={"reconstruct": True, "activation": "relu"})


def test_an_adapter_is_named() -> None:
    assert "--adapter" not in written()
    assert "fewfire pack smollm2 sparser-q4 --adapter adapter.safetensors" in written(adapter="adapter.safetensors")
    assert "gives the same" in written(adapter="adapter.safetensors", options={"rank": 24})
    assert "its updates being rounded" in written(adapter="adapter.safetensors", options={"adapter": True})


def test_what_is_known_of_the_original(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert Base.of("smollm2", file) == Base("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert Base.of("owner/name", tmp_path) == Base("owner/name", "owner/name")
    mine = tmp_path / "mine"
    mine.mkdir()
    assert Base.of(str(mine), mine) == Base("mine")
    (mine / "README.md").write_text("no front\nlicense: gpl\n---\n")
    assert Base.of(str(mine), mine) == Base("mine")
    (mine / "README.md").write_text("---\ntags:\n- a\nlicense: mit\n---\n# Mine\n")
    assert Base.of(str(mine), mine) == Base("mine", "", "mit")
    (mine / "README.md").write_text("---\ntags:\n- a\n---\n# Mine\nlicense: gpl\n---\n")
    assert Base.of(str(mine), mine) == Base("mine")


def test_a_run_leaves_a_card(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    book, out = tmp_path / "book.txt", tmp_path / "sparser"
    book.write_text(tiny.PARAGRAPH * 12)
    options = Options(tokens=600, window=32, batch=4, rank=3, sparsity=0.7)
    train("relufy", str(tiny_path("llama")), out, [book], options)
    text, entries = (out / card.NAME).read_text(), log.read(out / TRAINING / log.NAME)
    measured = [entry for entry in entries if "perplexity" in entry]
    assert f"{measured[-1]['zeros']:.1%} of its FFN neurons" in text
    assert "fewfire train relufy llama sparser --text book.txt --tokens 600 --sparsity 0.7" in text
    assert re.search(r"^512 tokens in 0.00 hours", text, re.M)
    assert str(tmp_path) not in text
    assert "--adapter adapter.safetensors" in text
    said = open_adapter(out / "adapter.safetensors")
    assert (said.base, said.about["tokens"], said.about["hours"]) == ("llama", 512, 0.0)
