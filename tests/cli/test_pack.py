import os

import pytest

import fewfire
from commandline import run


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


def test_bad_input(model, tmp_path):
    run("pack", "no-such-model", tmp_path / "x").failed(1, "no-such-model")
    run("pack", model, tmp_path / "x", "--weights", "q5").failed(2, "q5")
    run("pack", model, "/dev/null/x").failed(1, "/dev/null")
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    run("pack", model, tmp_path / "locked" / "x").failed(1, "locked")
