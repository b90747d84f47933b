import json
from dataclasses import replace

import pytest

import tiny
from commandline import run
from fewfire.selectors.methods import METHODS
from fewfire.selectors.store import About
from fewfire_cli.calibrate import lines
from fewfire_cli.human import size

ABOUT = About(
    "gate+screen", 0.5, {"gate": [0.4, 0.6], "screen": [0.03]}, {"density": 0.5}, "own", 100, 0.01, 0.001, 0.009, 0.97,
    50_000_000, 100_000_000, 1.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    """A packed model that these tests calibrate."""
    path = tmp_path_factory.mktemp("calibrated") / "packed"
    assert run("pack", model, path).code == 0
    return path


def test_from_calibrating_to_generating(packed, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny.PARAGRAPH * 10)
    prompt = ["generate", packed, "The keeper is", "--max-tokens", 12, "--json"]
    before = run(*prompt)
    result = run("calibrate", packed, "--method", "gate", "--density", "50%", "--text", text)
    assert result.code == 0
    assert result.out.startswith("method gate, density 0.5")
    assert "times as fast as dense" in result.out
    stats = json.loads(run(*prompt).out)["stats"]
    assert 0 < stats["bytes_per_token"] < stats["dense_bytes_per_token"]
    dense = json.loads(run(*prompt, "--dense").out)["stats"]
    assert dense["bytes_per_token"] == dense["dense_bytes_per_token"] == stats["dense_bytes_per_token"]
    assert json.loads(run(*prompt, "--dense").out)["text"] == json.loads(before.out)["text"]
    assert "method gate" in run("info", packed).out
    about = json.loads(run("info", packed, "--json").out)["calibration"]
    on_disk = sum(file.stat().st_size for file in packed.glob("selectors*"))
    assert (about["method"], about["disk_bytes"]) == ("gate", on_disk)
    assert result.out.strip().endswith(f"{size(on_disk)} on disk")
    run("calibrate", packed, "--remove", "--budget", "1%").failed(2, "--remove goes alone")
    assert run("calibrate", packed, "--remove").out == f"removed the calibration of {packed} ({size(on_disk)})\n"
    assert not list(packed.glob("selectors*"))
    assert json.loads(run(*prompt).out)["text"] == json.loads(before.out)["text"]
    assert json.loads(run("calibrate", packed, "--remove", "--json").out) == {"removed_bytes": 0}
    assert run("calibrate", packed, "--remove").out == "there is no calibration\n"


def test_lines():
    assert lines(ABOUT, 85_000_000)[0] == "method gate+screen, density 0.50: gate 0.5 (0.4 to 0.6); screen 0.03"
    assert lines(ABOUT, 85_000_000)[2].endswith("1.50 times as fast as dense; 85.0 MB on disk")
    assert "misses" not in "".join(lines(ABOUT, 0))
    assert lines(replace(ABOUT, missed=0.004), 0)[1].endswith(
        "over 100 tokens; the head misses the likeliest in at most 0.4%"
    )


def test_the_help_names_all_methods():
    text = run("calibrate", "--help").out
    for name in (*METHODS, "reuse-8"):
        assert f" {name} " in text.replace(",", " ")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--method", "gate"], 2, ["either a density or a budget"]),
        (["--budget", "1"], 2, ["percent sign"]),
        (["--density", "x"], 2, ["'x'"]),
        (["--method", "magic", "--density", "0.5"], 2, ["unknown method 'magic'", "gate"]),
        (["--method", "gate+reuse-8+reuse-4", "--density", "0.5"], 2, ["does not go together"]),
        (["--method", "exact", "--density", "0.5"], 2, ["no calibration"]),
    ],
)
def test_bad_input(packed, args, code, words):
    run("calibrate", packed, *args).failed(code, *words)
