import json
import sys

import numpy as np
import pytest

from commandline import run
from fewfire.analyze import analyze
from fewfire.pack import pack
from fewfire.packed import open_packed
from fewfire.selectors import Predictor, Selection, store
from fewfire.tokenizer import Tokenizer
from fewfire.windows import windows
from tiny import PARAGRAPH


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(PARAGRAPH, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def relu(tiny_path, tmp_path_factory):
    return pack(tiny_path("llama-relu"), tmp_path_factory.mktemp("analyze") / "relu", "q8")


def windows_of(path, limit):
    return windows(Tokenizer.from_file(path / "tokenizer.json"), open_packed(path).config, PARAGRAPH, 160, limit)


def test_json_equals_the_library(relu, text):
    data = json.loads(run("analyze", relu, "--text", text, "--tokens", 120, "--json").out)
    expected = analyze(open_packed(relu), windows_of(relu, 120))
    assert data == json.loads(json.dumps(expected.to_dict()))
    assert (data["tokens"], data["weights"], data["exact"], len(data["layers"])) == (120, "q8", True, 3)


def test_table(relu, text):
    result = run("analyze", relu, "--text", text)
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 100
    at = next(i for i, line in enumerate(lines) if line.split()[:1] == ["layer"])
    assert " ".join(lines[at].split()) == "layer zero <1% 50% 90% 99% kept never often t=8 t=32 t=128"
    zeros = [float(line.split()[1].rstrip("%")) for line in lines[at + 1 : at + 4]]
    found = analyze(open_packed(relu), windows_of(relu, None))
    assert zeros == pytest.approx([100 * layer.zeros for layer in found.layers], abs=0.06)
    assert [line.split()[0] for line in lines[at + 1 :] if line][:4] == ["0", "1", "2", "mean"]
    assert "active: h is not zero" in lines


def test_a_calibrated_predictor_is_judged(tiny_path, text, tmp_path):
    path = pack(tiny_path("llama-relu"), tmp_path / "calibrated", "q8")
    packed = open_packed(path)
    layers, neurons = packed.config.num_hidden_layers, packed.config.intermediate_size
    members = np.tile(np.arange(neurons, dtype=np.int32), (layers, 1))
    predictor = Predictor(packed.arrays["gate"], np.full((layers, neurons), -0.5, np.float32), members)
    numbers = dict.fromkeys(("density", "growth", "growth_error", "kl", "agreement", "speedup"), 1.0)
    sizes = dict.fromkeys(("tokens", "bytes_per_token", "dense_bytes_per_token"), 1)
    about = store.About(method="lowrank", densities={}, settings={}, sample="none", **numbers, **sizes)
    store.save(packed, Selection("lowrank", predictor=predictor), about)
    lines = run("analyze", path, "--text", text).out.splitlines()
    assert max(map(len, lines)) <= 100
    read, recall, precision = (float(cell.rstrip("%")) for cell in lines[-4].split()[-3:])
    assert 5 < read < 45
    assert 20 < recall < 90
    assert precision == 100
    data = json.loads(run("analyze", path, "--text", text, "--json").out)
    assert [100 * part for part in data["mean"]["predictor"]] == pytest.approx([recall, precision, read], abs=0.06)
    assert json.loads(run("analyze", path, "--text", text, "--dense", "--json").out)["mean"]["predictor"] is None
    (path / store.NAME).write_text("{}", encoding="utf-8")
    stale = run("analyze", path, "--text", text, "--json")
    assert stale.code == 0
    assert "the calibration cannot be used" in stale.err
    assert json.loads(stale.out)["mean"]["predictor"] is None
    assert "cannot be used" not in run("analyze", path, "--text", text, "--dense", "--json").err


def test_what_it_reads_without_a_text(relu):
    data = json.loads(run("analyze", relu, "--tokens", 50, "--json").out)
    assert data["tokens"] == 50


def test_what_active_means_without_zeros(model, text):
    out = run("analyze", model, "--text", text, "--tokens", 20).out
    assert "active: the largest |h| that hold 90%" in out
    assert "t=8" in out
    assert "t=32" not in out  # there are no 32 tokens in a row


def test_pictures(relu, text, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the `plot` extra")
    result = run("analyze", relu, "--text", text, "--tokens", 60, "--plot", tmp_path / "new" / "all.png")
    assert (tmp_path / "new" / "all.png").read_bytes().startswith(b"\x89PNG")
    assert "all.png" in result.err
    assert run("analyze", relu, "--text", text, "--tokens", 60, "--json", "--plot", tmp_path / "each").code == 0
    assert {path.name for path in (tmp_path / "each").iterdir()} == {
        f"{name}.png" for name in ("depth", "energy", "magnitudes", "positions", "overlap", "aggregated")
    }


def test_without_matplotlib(relu, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fewfire.pictures", raising=False)
    run("analyze", relu, "--text", text, "--plot", tmp_path / "a.png").failed(1, "pip install 'fewfire[plot]'")
    assert run("analyze", relu, "--text", text, "--tokens", 20).code == 0


def test_bad_input(relu, text, tmp_path):
    run("analyze", relu, "--text", tmp_path / "none").failed(1, "none: No such file")
    run("analyze", relu, "--text", text, "--tokens", 1).failed(2, "at least 2")
    run("analyze", relu, "--text", text, "--plot", tmp_path / "a.jpg").failed(2, "--plot", ".png")
    (tmp_path / "empty").write_bytes(b"")
    run("analyze", relu, "--text", tmp_path / "empty").failed(2, "0 tokens")


def test_methods_at_densities(model, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the `plot` extra")
    path, text = pack(model, tmp_path / "packed", "q4"), tmp_path / "long.txt"
    text.write_text(PARAGRAPH * 12)
    options = ["--text", text, "--methods", "gate,gate+down", "--densities", "0.8,0.5", "--tokens", 200]
    result = run("analyze", path, *options, "--plot", tmp_path / "plots")
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 120
    rows = [line.split() for line in lines[-4:]]
    assert [row[:2] for row in rows] == [["gate", "0.8"], ["gate", "0.5"], ["gate+down", "0.8"], ["gate+down", "0.5"]]
    assert "fitting" in result.err or "reading the sample" in result.err
    assert (tmp_path / "plots" / "methods.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(run("analyze", path, *options, "--json").out)
    assert [f"{100 * point['growth']:+.2f}%" for point in data["points"]] == [row[3] for row in rows]
    assert [f"{100 * point['agreement']:.1f}%" for point in data["points"]] == [row[-2] for row in rows]


def test_bad_methods(relu, text, monkeypatch, tmp_path):
    run("analyze", relu, "--methods", "magic").failed(2, "unknown method 'magic'")
    run("analyze", relu, "--methods", "gate", "--densities", "0.5,x").failed(2, "0.7,0.5,0.3")
    run("analyze", relu, "--methods", "gate", "--densities", "1.5").failed(2, "density must be")
    run("analyze", relu, "--densities", "0.5").failed(2, "--methods")
    run("analyze", relu, "--methods", "gate", "--text", text).failed(2, "too few to calibrate on")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("fewfire.pictures", "fewfire.tradeoffpicture"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    run("analyze", relu, "--methods", "gate", "--plot", tmp_path / "a.png").failed(1, "pip install 'fewfire[plot]'")
