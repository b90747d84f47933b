"""Every source counts, wherever it lies in the package, and nothing else does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fewfire
from fewfire import revision


def test_every_source_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(Path(fewfire.__file__).parent, tmp_path / "fewfire"))
    monkeypatch.setattr(revision, "__file__", str(copy / "revision.py"))
    ours = revision.revision.__wrapped__()
    assert ours == revision.revision()
    (copy / "kernels" / "__pycache__" / "new.pyc").parent.mkdir(exist_ok=True)
    (copy / "kernels" / "__pycache__" / "new.pyc").write_bytes(b"new")
    assert revision.revision.__wrapped__() == ours
    seen = {ours}
    for name in ("spread.py", "kernels/decode.py", "selectors/scores.py"):
        text = (copy / name).read_text()
        (copy / name).write_text(text + "\n")
        seen.add(revision.revision.__wrapped__())
        (copy / name).write_text(text)
    (copy / "spread.py").rename(copy / "spreads.py")
    assert len(seen | {revision.revision.__wrapped__()}) == 5
