"""The picture is drawn of whatever can be measured; what it looks like is for people to judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewfire.tradeoff import Point, Tradeoff

pytest.importorskip("matplotlib", reason="needs the `plot` extra")
from fewfire.tradeoffpicture import draw


def point(method: str, density: float, growth: float, error: float | None) -> Point:
    return Point(method, density, density, {}, growth, error, 0.01, 0.9, 100 * density, None)


@pytest.mark.parametrize("growths", [(0.001, 0.02, 3.0), (-0.02, -0.001, 0.0), (0.0, 0.0, 0.0), (1e5, 1e9, 1e300)])
def test_any_growth(growths: tuple[float, ...], tmp_path: Path) -> None:
    points = [
        point(f"{name}", 1 - i / 4, growth, None if i else 0.001)
        for name in range(13)
        for i, growth in enumerate(growths)
    ]
    found = Tradeoff("tiny", "q4", 100, 12.0, 100, tuple(points))
    assert draw(found, tmp_path / "new" / "all.png") == [tmp_path / "new" / "all.png"]
    assert draw(found, tmp_path / "each") == [tmp_path / "each" / "methods.png"]
    assert (tmp_path / "each" / "methods.png").read_bytes().startswith(b"\x89PNG")
