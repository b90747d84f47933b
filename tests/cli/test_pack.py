import json
import os

import numpy as np
import pytest

import fewfire
from commandline import run
from fewfire import adapter, sources
from fewfire.checkpoint import open_checkpoint
from fewfire.selectors import trained
from tiny import write_tiny


def test_pack_then_use(model, tmp_path):
    out = tmp_path / "new folder" / "packed"
    result = run("pack", model, out, "--weights", "f32")
    assert result.code == 0
    assert str(out) in result.out
    assert fewfire.load(out).weights == "f32"
    assert run("generate", out, "The keeper", "--max-tokens", 4).code == 0
    assert sorted(os.listdir(out.parent)) == ["packed"]


def test_an_existing_target_is_replaced_only_by_force_and_only_a_packed_model(model, tmp_path):
    out = tmp_path / "packed"
    assert run("pack", model, out, "--weights", "q8").code == 0
    run("pack", model, out).failed(2, "exists", "--force")
    assert fewfire.load(out).weights == "q8"
    assert run("pack", model, out, "--force").code == 0
    assert fewfire.load(out).weights == "q4"
    assert os.listdir(tmp_path) == ["packed"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    run("pack", model, tmp_path / "mine", "--force").failed(2, "no packed model")
    run("pack", model, tmp_path / "mine" / "letter.txt", "--force").failed(2, "no packed model")
    run("pack", out, tmp_path / "again").failed(2, "packed already")


def test_a_failed_replacement_leaves_the_old_one(model, tmp_path, monkeypatch):
    import fewfire.pack

    out = tmp_path / "packed"
    assert run("pack", model, out, "--weights", "q8").code == 0

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fewfire.pack, "_layer_rows", interrupted)
    assert run("pack", model, out, "--force").code == 130
    assert fewfire.load(out).weights == "q8"
    assert os.listdir(tmp_path) == ["packed"]


@pytest.fixture
def small(model, tmp_path):
    """An adapter for the tiny model."""
    found = {"layers.0.gate.A": np.ones((1, 64), np.float16), "layers.0.gate.B": np.ones((96, 1), np.float16)}
    about = {"base": "tiny", "method": "test", "config": {"hidden_act": "relu"}, "about": {}}
    adapter.save(tmp_path / "small.safetensors", open_checkpoint(model), found, **about)
    return tmp_path / "small.safetensors"


def test_an_adapter_is_merged(model, small, tmp_path):
    assert run("pack", model, tmp_path / "packed", "--adapter", small).code == 0
    packed = fewfire.load(tmp_path / "packed")
    assert packed.config.hidden_act == "relu"
    assert packed.packed.name == model.name
    assert "relu" in run("info", tmp_path / "packed").out


def test_an_alias_with_an_adapter(model, small, tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(sources.wheels, "fetch", lambda *_: model)
    alias = sources.AdaptedModel("tiny-relu", "a test", "smollm2", str(small))
    monkeypatch.setattr(sources, "ADAPTED", {alias.name: alias})
    assert "gated" in run("info", "tiny-relu").out
    assert json.loads(run("info", "tiny-relu", "--json").out)["config"]["hidden_act"] == "relu"
    assert run("generate", "tiny-relu", "x", "--max-tokens", 1).code == 0
    assert "tiny-relu:q4  packed" in run("models").out
    assert run("pack", "tiny-relu", tmp_path / "packed").code == 0
    assert fewfire.load(tmp_path / "packed").packed.name == "tiny-relu"
    run("pack", "tiny-relu", tmp_path / "again", "--adapter", small).failed(2, "has an adapter already")
    run("info", "nothing").failed(1, "tiny-relu")


def test_adapters_that_do_not_fit(model, small, tmp_path):
    other = write_tiny("llama", tmp_path / "other", seed=1)
    run("pack", other, tmp_path / "x", "--adapter", small).failed(1, str(small), "made for tiny")
    run("pack", model, tmp_path / "x", "--adapter", tmp_path / "none").failed(
        1, str(tmp_path / "none"), "cannot be read"
    )
    run("pack", model, tmp_path / "x", "--adapter", model / "model.safetensors").failed(1, "no adapter")
    assert not (tmp_path / "x").exists()


def test_what_a_model_was_trained_with_comes_along(tmp_path):
    source = write_tiny("llama", tmp_path / "source")
    (source / trained.NAME).write_text(json.dumps({"version": 1, "method": "topk", "k": [5, 5, 5]}))
    assert run("pack", source, tmp_path / "packed").code == 0
    assert "trained to choose its neurons by topk" in run("info", tmp_path / "packed").out
    run("calibrate", tmp_path / "packed", "--budget", "1%").failed(2, "was trained with a choice of its neurons")
    (source / trained.NAME).write_text("{")
    run("pack", source, tmp_path / "again").failed(1, trained.NAME, "not valid JSON")


def test_bad_input(model, tmp_path):
    run("pack", "no-such-model", tmp_path / "x").failed(1, "no-such-model")
    run("pack", model, tmp_path / "x", "--weights", "q5").failed(2, "q5")
    run("pack", model, "/dev/null/x").failed(1, "/dev/null")
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    run("pack", model, tmp_path / "locked" / "x").failed(1, "locked")
