"""The kernels' benchmark end to end, on a matrix that is not large at all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from perf import gathered, kernels, results
from perf.report import figures


def test_every_combination_is_measured_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    options = ["--weights", "q4", "f32", "--columns", "64", "2048", "--density", "1", "0.1", "--threads", "1", "2"]
    kernels.main([*options, "--rounds", "2", "--megabytes", "10", "--name", "k"])
    result = json.loads((tmp_path / "k.json").read_text())
    found = {tuple(r[k] for k in ("kernel", "weights", "columns", "threads", "density")) for r in result["speeds"]}
    assert len(found) == len(result["speeds"]) == 3 * 2 * 2 * 2 * 2
    assert all(r["gb_per_second"]["min"] > 0 for r in result["speeds"])
    assert all(r["of_gathered"]["median"] == 1 for r in result["speeds"] if r["kernel"] == "gathered read")
    assert [(r["weights"], r["columns"]) for r in result["full_lists"]] == [
        ("q4", 64), ("q4", 2048), ("f32", 64), ("f32", 2048)
    ]  # fmt: skip
    assert "gather_axpy f32" in capsys.readouterr().out
    text = figures({"k": result})
    assert "gather_axpy q4" in text
    assert "f32" not in text  # the README has the usual ones


@pytest.mark.parametrize("way", gathered.WAYS)
def test_a_gathered_read_sees_the_listed_rows(way):
    words = np.zeros(8 + 40 * 12, np.int64)
    matrix = words[-words.ctypes.data % 64 // 8 :][: 40 * 12].reshape(40, 12)  # rows of one and a half lines
    matrix[::2] = 1
    even, odd = (np.arange(start, 40, 2, dtype=np.int32) for start in (0, 1))
    place = (matrix.ctypes.data, matrix.strides[0], matrix.strides[0])
    assert way(*place, gathered.described([odd[:0]])) == 0
    assert way(*place, gathered.described([even, even[:7]])) >= 2 * 27
    matrix[::2] = 0
    assert way(*place, gathered.described([even])) == 0


@pytest.mark.parametrize("mapped", [False, True])
def test_a_large_matrix_begins_on_a_page(mapped):
    with kernels.large_matrix("q8", 576, 1, mapped) as rows:
        assert rows.raw.ctypes.data % 4096 == 0
        assert rows.raw.nbytes == rows.count * rows.row_bytes
        assert 0.8e6 < rows.raw.nbytes <= 1e6


@pytest.mark.parametrize("density", [1.0, 0.5, 0.02])
def test_lists_are_sorted_and_as_dense_as_they_should_be(density):
    lists = kernels.random_lists(np.random.default_rng(0), 5000, density)
    assert len(lists) == round(1 / density)
    assert all((np.diff(one) > 0).all() and one[0] >= 0 and one[-1] < 5000 for one in lists)
    assert sum(one.size for one in lists) == pytest.approx(5000, rel=0.1)
