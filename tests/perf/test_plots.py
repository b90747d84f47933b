"""Pictures of results."""

from __future__ import annotations

import pytest

from perf import report

plots = pytest.importorskip("perf.plots", exc_type=ImportError)

SPREAD = {"median": 2.0, "min": 1.0, "max": 3.0}


def _point(model: str, parameters: int, context: int) -> dict:
    return {"model": model, "parameters": parameters, "context": context, "name": "fewfire:q4", "threads": 1,
            "milliseconds_per_token": SPREAD, "floor_milliseconds": 1.5}  # fmt: skip


def _judged(read: float, *growth: float) -> dict:
    return {"rows_read": {"down": read}, "texts": [{"growth_percent": each} for each in growth]}


MEASURED = {
    "speed": {
        "kind": "decode",
        "model": "m",
        "contenders": [{"name": "fewfire:q4", "threads": t, "decode_tokens_per_second": SPREAD} for t in (1, 2)],
    },
    "grown": {
        "kind": "growth",
        "points": [_point("a", 10**8, 128), _point("a", 10**8, 256), _point("b shape, random weights", 10**9, 128)],
    },
    "flat": {"kind": "growth", "points": [_point("a", 10**8, 128)]},
    "rows": {
        "kind": "kernels",
        "densities": [1.0, 0.1],
        "bandwidth": [{"threads": 1, "gb_per_second": SPREAD}],
        "speeds": [
            {"kernel": "gather_dot", "weights": "q4", "columns": c, "threads": 1, "density": d, "gb_per_second": SPREAD}
            for c in (2048, 4096)
            for d in (1.0, 0.1)
        ],
    },
    "load": {
        "kind": "busy",
        "model": "m",
        "threads": 2,
        "speeds": [{"name": "fewfire:q4", "busy": b, "tokens_per_second": SPREAD} for b in (0, 1, 2)],
    },
    "ways": {
        "kind": "methods",
        "model": "m",
        "threads": 2,
        "rows": [
            {"method": f"method {m}", "spread": s, "asked": d, "speedup": 1 / d, "growth_percent": m - 10 * d}
            for m in range(8)
            for s in ("spread", "uniform")
            for d in (0.9, 0.5)
        ],
    },
    "taught": {
        "kind": "trained",
        "texts": [{"label": "a"}, {"label": "b"}],
        "rows": [_judged(0.5, 1, -3) | {"name": name} for name in ("mine", "x")],
        "curve": {"name": "mine", "points": [_judged(read, 50 - 50 * read, -1) for read in (1.0, 0.1)]},
    },
    "untaught": {"kind": "trained", "texts": [], "rows": [], "curve": {}},
    "other": {"kind": "quality"},
}


def test_no_text_and_no_engine_is_one_too_many():
    texts, names = [f"text {i}" for i in range(18)], [f"engine {i}" for i in range(18)]
    taught = {
        "texts": [{"label": text} for text in texts],
        "rows": [],
        "curve": {"name": "mine", "points": [_judged(read, *range(1, 19)) for read in (1.0, 0.5)]},
    }
    grown = {"points": [_point("a", 10**8, c) | {"name": name} for name in names for c in (128, 256)]}
    for picture, labels in ((plots._tradeoff(taught), texts), (plots._context(grown), names)):
        drawn = [(line.get_label(), line.get_color(), line.get_linestyle()) for line in picture.axes[0].get_lines()]
        looks = {label: look for label, *look in drawn if label != "its floor"}
        floors = [look for label, *look in drawn if label == "its floor"]
        assert list(looks) == labels
        assert all(list(looks.values()).count(look) == 1 and look not in floors for look in looks.values())
        plots.plt.close(picture)


def test_pictures_are_drawn_and_old_ones_go(tmp_path, monkeypatch):
    (tmp_path / "gone.png").write_bytes(b"")
    written = plots.draw(MEASURED, tmp_path)
    names = {"speed.png", "grown-context.png", "grown-size.png", "rows.png", "load.png", "ways-growth.png"}
    names |= {"taught-curve.png"}
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000 for path in written)
    before = {path.name: path.read_bytes() for path in written}
    plots.draw(MEASURED, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}  # the same results, the same files
    monkeypatch.setattr(report, "PLOTS", tmp_path)
    assert [line.split("/")[-1] for line in report._pictures("grown")] == ["grown-context.png)", "grown-size.png)"]
    assert report._pictures("other") == []
