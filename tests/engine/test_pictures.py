"""Pictures are drawn of whatever an analysis can be; what they look like is for people to judge."""

import dataclasses

import pytest

from fewfire.analyze import analyze
from fewfire.packed import open_packed
from fewfire.sparsity import Quality
from tiny import prompt

pytest.importorskip("matplotlib", reason="needs the `plot` extra")
from fewfire.pictures import draw


@pytest.mark.parametrize("family", ["llama", "llama-relu"])
def test_one_file_each_and_all_on_a_page(family, packed_path, tmp_path):
    analysis = analyze(open_packed(packed_path(family, "q4")), [prompt(40)])
    assert draw(analysis, tmp_path / "all.png") == [tmp_path / "all.png"]
    written = draw(analysis, tmp_path / "some" / "where")
    assert len(written) == 6
    for path in (*written, tmp_path / "all.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_predictor_adds_one(packed_path, tmp_path):
    analysis = analyze(open_packed(packed_path("llama-relu", "q4")), [prompt(20)])
    layers = tuple(dataclasses.replace(layer, predictor=Quality(0.9, 0.5, 0.3)) for layer in analysis.layers)
    judged = dataclasses.replace(analysis, layers=layers)
    assert draw(judged, tmp_path)[-1] == tmp_path / "predictor.png"
    assert draw(judged, tmp_path / "all.png") == [tmp_path / "all.png"]


def test_a_single_layer_of_two_tokens(packed_path, tmp_path):
    analysis = analyze(open_packed(packed_path("opt", "q4")), [prompt(2)])
    draw(dataclasses.replace(analysis, layers=analysis.layers[:1]), tmp_path / "all.png")
