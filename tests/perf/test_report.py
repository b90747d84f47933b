"""The README's figures are those of perf/results."""

from __future__ import annotations

import pytest

from perf import report

MACHINE = {"cpu": "Some CPU", "llvm_cpu": "somecpu", "cores": 2, "level": "plain", "versions": {"fewfire": "1"}}
SPREAD = {"median": 2.0, "min": 1.0, "max": 3.0}
START = {
    "kind": "start",
    "date": "2026-01-01",
    "machine": MACHINE,
    "model": "smollm2",
    "runs": {"warm": 3, "cold": 1},
    "used_by_others": 0.2,
    "threads": 2,
    "contenders": [
        {
            "name": "fewfire:q4",
            "threads": 2,
            "warm": SPREAD,
            "no_kernels": SPREAD,
            "no_packed_model": None,
            "mb": 92.0,
            "memory_mb": {"resident": 200.0, "peak": 210.0},
        }
    ],
}


def test_the_readme_is_up_to_date():
    assert report.is_current(), "run python -m perf.report"


def test_figures_go_between_the_markers():
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.rewritten(readme, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.rewritten(readme, "") == f"before\n{report.BEGIN}\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="figures:begin"):
        report.rewritten("no markers", "new")


def test_a_section_tells_figures_machine_and_doubts():
    text = report.figures({"start": START})
    assert "| fewfire:q4 | 2.00 (1.00..3.00) |" in text
    assert "Some CPU (somecpu), 2 cores" in text
    assert "Others used 20%" in text


def test_a_kind_without_a_section_is_an_error():
    with pytest.raises(ValueError, match="nonsense"):
        report.figures({"x": START | {"kind": "nonsense"}})
